//! Three brokers, each also a controller: the smallest cluster that survives the loss of one.

use std::path::Path;

use anyhow::Result;
use futures::future::try_join_all;

use super::{Kafka, Node, Settings, properties, start_node};
use crate::fetch::Fetched;
use crate::ports;
use crate::process::Logs;

/// Heap of each broker. The three together use about 900 MB, so that they fit a small machine.
const HEAP: &str = "-Xmx256m";

/// Starts one broker for each port, on the data in `folder/1`, `folder/2`, …, and waits until each
/// is a registered member of the cluster.
pub async fn start_cluster(fetched: &Fetched, folder: &Path, ports: &[u16], logs: &Logs) -> Result<Vec<Kafka>> {
    let node = |(id, port): (i32, &u16)| Node { id, port: *port, controller: ports::free() };
    let nodes: Vec<Node> = (1..).zip(ports).map(node).collect();
    // All at once, because a single broker has no majority and cannot elect a controller.
    try_join_all(nodes.iter().map(async |node| {
        let folder = folder.join(node.id.to_string());
        let settings = Settings::without_users(properties(&folder, *node, &nodes));
        start_node(fetched, &folder, &format!("kafka-{}", node.id), *node, HEAP, &settings, logs).await
    }))
    .await
}
