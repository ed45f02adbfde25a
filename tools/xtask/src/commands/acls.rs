//! `cargo xtask acls`: what each service may do on Kafka, shown or granted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use testbed::fetch::fetch;
use testbed::kafka::{self, Changes};
use testbed::process::Logs;
use testbed::say::say;
use topology::acls::{Naming, Rule, all_rules};

#[derive(Args, Clone)]
pub struct Acls {
    /// Print the rules and change nothing.
    #[arg(long, required_unless_present = "apply", conflicts_with = "apply")]
    table: bool,
    /// Change the rules of the cluster: add those that are missing, and remove all other rules of
    /// the services' principals. Rules of other principals stay.
    #[arg(long)]
    apply: bool,
    /// Bootstrap servers of the cluster.
    #[arg(long, default_value = "localhost:9092", requires = "apply")]
    servers: String,
    /// A file with the properties of a Java client that may change rules: security.protocol,
    /// sasl.mechanism, sasl.jaas.config and others.
    #[arg(long, value_name = "FILE", requires = "apply")]
    client: Option<PathBuf>,
    /// The TOPIC_PREFIX of the services.
    #[arg(long, default_value = "")]
    topic_prefix: String,
    /// Also what the services need with MANAGE_TOPICS=true: to create their topics.
    #[arg(long)]
    manage_topics: bool,
}

pub async fn run(options: Acls) -> Result<ExitCode> {
    let naming = Naming { topic_prefix: &options.topic_prefix, manage_topics: options.manage_topics };
    let rules = all_rules(naming);
    if options.table {
        print(&rules);
        return Ok(ExitCode::SUCCESS);
    }
    let fetched = fetch().await?;
    let logs = Logs::to_files("acls")?;
    let client = options.client.as_deref();
    let acls = kafka::Acls { fetched: &fetched, servers: &options.servers, client, logs: &logs };
    let Changes { added, removed } = acls.apply(&rules).await?;
    for rule in &removed {
        say(format_args!(
            "removed: {} {} {} on {} {} {} from host {}",
            rule.principal, rule.permission, rule.operation, rule.resource, rule.pattern, rule.name, rule.host
        ));
    }
    say(format_args!("{} rules: {added} added; {} others removed", rules.len(), removed.len()));
    Ok(ExitCode::SUCCESS)
}

/// One line for each principal and resource.
fn print(rules: &BTreeSet<Rule>) {
    let mut lines: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for rule in rules {
        let line = (&rule.principal, rule.resource, &rule.name);
        lines.entry(line).or_default().push(rule.operation.to_string());
    }
    for ((principal, resource, name), operations) in lines {
        say(format_args!("{principal:<24} {resource:<16} {name:<32} {}", operations.join(" ")));
    }
}
