//! Three brokers, each a controller too: the smallest cluster that goes on without one of them.

use std::path::Path;

use anyhow::Result;
use futures::future::try_join_all;

use super::{Kafka, Node, properties, start_node};
use crate::fetch::Fetched;
use crate::ports;
use crate::process::Logs;

/// They share the memory of a small machine: 900 MB for the three.
const HEAP: &str = "-Xmx256m";

/// Starts one broker for each port, on the data in `folder/1`, `folder/2`, …, and waits until each leads or follows.
pub async fn start_cluster(fetched: &Fetched, folder: &Path, ports: &[u16], logs: &Logs) -> Result<Vec<Kafka>> {
    let node = |(id, port): (i32, &u16)| Node { id, port: *port, controller: ports::free() };
    let nodes: Vec<Node> = (1..).zip(ports).map(node).collect();
    // Together: alone none has the majority that elects a controller.
    try_join_all(nodes.iter().map(async |node| {
        let folder = folder.join(node.id.to_string());
        let settings = properties(&folder, *node, &nodes);
        start_node(fetched, &folder, &format!("kafka-{}", node.id), *node, HEAP, &settings, logs).await
    }))
    .await
}
