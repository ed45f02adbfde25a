//! The rules that a broker's authorizer holds: listed and changed with Kafka's own tool, because
//! rust-rdkafka has no calls for them. A call takes about a second.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use topology::acls::{Rule, grants};

use super::run_java;
use crate::fetch::Fetched;
use crate::process::Logs;

const TOOL: &str = "org.apache.kafka.tools.AclCommand";
/// How many calls run at the same time. Each is a Java process.
const CALLS: usize = 2;

/// A rule as the broker lists it. Unlike those of the topology it may deny something, name a host,
/// or concern all names with a prefix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeldRule {
    pub principal: String,
    pub resource: String,
    pub name: String,
    /// `LITERAL` or `PREFIXED`.
    pub pattern: String,
    pub operation: String,
    /// `ALLOW` or `DENY`.
    pub permission: String,
    pub host: String,
}

impl From<&Rule> for HeldRule {
    fn from(rule: &Rule) -> Self {
        Self {
            principal: rule.principal.clone(),
            resource: rule.resource.to_string(),
            name: rule.name.clone(),
            pattern: "LITERAL".to_owned(),
            operation: rule.operation.to_string(),
            permission: "ALLOW".to_owned(),
            host: "*".to_owned(),
        }
    }
}

/// What [`Acls::apply`] has changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub added: usize,
    pub removed: Vec<HeldRule>,
}

/// The authorizer of a cluster.
pub struct Acls<'a> {
    pub fetched: &'a Fetched,
    /// Bootstrap servers.
    pub servers: &'a str,
    /// A file with the properties of a Java client that may change rules. `None`: the listener of
    /// `servers` asks for no login.
    pub client: Option<&'a Path>,
    pub logs: &'a Logs,
}

impl Acls<'_> {
    /// Every rule that the broker holds.
    pub async fn held(&self) -> Result<BTreeSet<HeldRule>> {
        parse(&self.call(0, &["--list".to_owned()]).await?)
    }

    /// Adds the rules that are missing, and removes all other rules of the same principals. Rules
    /// of other principals stay. Crash in between: some rules are missing or not removed yet, and
    /// the next call continues.
    pub async fn apply(&self, rules: &BTreeSet<Rule>) -> Result<Changes> {
        let held = self.held().await?;
        let missing: BTreeSet<Rule> = rules.iter().filter(|rule| !held.contains(&(*rule).into())).cloned().collect();
        let principals: BTreeSet<&str> = rules.iter().map(|rule| rule.principal.as_str()).collect();
        let wanted: BTreeSet<HeldRule> = rules.iter().map(HeldRule::from).collect();
        let superfluous = held.into_iter().filter(|rule| principals.contains(rule.principal.as_str()));
        let superfluous: Vec<HeldRule> = superfluous.filter(|rule| !wanted.contains(rule)).collect();
        let mut calls: Vec<Vec<String>> = grants(&missing).iter().map(topology::acls::Grant::arguments).collect();
        calls.extend(superfluous.iter().map(removal));
        for calls in calls.chunks(CALLS) {
            try_join_all(calls.iter().enumerate().map(|(number, call)| self.call(number, call))).await?;
        }
        Ok(Changes { added: missing.len(), removed: superfluous })
    }

    /// Runs the tool and returns what it prints. `number` distinguishes calls that run at the same
    /// time.
    async fn call(&self, number: usize, arguments: &[String]) -> Result<String> {
        let mut all = vec!["--bootstrap-server".to_owned(), self.servers.to_owned()];
        if let Some(client) = self.client {
            all.extend(["--command-config".to_owned(), client.display().to_string()]);
        }
        all.extend_from_slice(arguments);
        let (status, printed) = run_java(self.fetched, &format!("kafka-acls-{number}"), TOOL, &all, self.logs).await?;
        // The tool exits with status 0 also after some errors.
        let is_done = status.success() && !printed.contains("Error while executing ACL command");
        ensure!(is_done, "Kafka's tool for rules fails at {}: {printed}", self.servers);
        Ok(printed)
    }
}

/// The arguments that remove exactly this rule.
fn removal(rule: &HeldRule) -> Vec<String> {
    let effect = if rule.permission == "DENY" { "deny" } else { "allow" };
    let flag = format!("--{}", rule.resource.to_lowercase().replace('_', "-"));
    let mut arguments = vec!["--remove".to_owned(), "--force".to_owned()];
    arguments.extend([format!("--{effect}-principal"), rule.principal.clone()]);
    arguments.extend([format!("--{effect}-host"), rule.host.clone()]);
    arguments.extend(["--operation".to_owned(), pascal_case(&rule.operation)]);
    arguments.extend(["--resource-pattern-type".to_owned(), rule.pattern.to_lowercase(), flag]);
    if rule.resource != "CLUSTER" {
        arguments.push(rule.name.clone());
    }
    arguments
}

/// The tool prints `DESCRIBE_CONFIGS` and accepts `DescribeConfigs`.
fn pascal_case(operation: &str) -> String {
    operation.split('_').map(|word| format!("{}{}", &word[..1], word[1..].to_lowercase())).collect()
}

/// Reads the list that the tool prints: a heading for each resource, then a line for each rule.
fn parse(printed: &str) -> Result<BTreeSet<HeldRule>> {
    let mut rules = BTreeSet::new();
    let mut resource = None;
    for line in printed.lines() {
        if let Some((_, heading)) = line.split_once("ResourcePattern(") {
            let value =
                |name: &str| value(heading, name).context("a heading of Kafka's list of rules is not as expected");
            resource = Some((value("resourceType")?, value("name")?, value("patternType")?));
        } else if let Some(rule) = line.trim().strip_prefix("(principal=") {
            let rule = format!("principal={rule}");
            let value = |name: &str| value(&rule, name).context("a line of Kafka's list of rules is not as expected");
            let (resource, name, pattern) =
                resource.clone().context("Kafka's list of rules has a rule without resource")?;
            rules.insert(HeldRule {
                principal: value("principal")?,
                resource,
                name,
                pattern,
                operation: value("operation")?,
                permission: value("permissionType")?,
                host: value("host")?,
            });
        }
    }
    Ok(rules)
}

/// The value in `name=value, …`, which ends at a comma or at the closing parenthesis.
fn value(text: &str, name: &str) -> Option<String> {
    let (_, rest) = text.split_once(&format!("{name}="))?;
    Some(rest.split([',', ')']).next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str =
        "Current ACLs for resource `ResourcePattern(resourceType=TOPIC, name=a.b, patternType=LITERAL)`: 
 \t(principal=User:x, host=*, operation=DESCRIBE_CONFIGS, permissionType=ALLOW)
\t(principal=User:y, host=10.0.0.1, operation=READ, permissionType=DENY)

Current ACLs for resource `ResourcePattern(resourceType=TRANSACTIONAL_ID, name=t., patternType=PREFIXED)`: 
 \t(principal=User:x, host=*, operation=WRITE, permissionType=ALLOW)
";

    #[test]
    fn the_list_of_the_tool_is_read() {
        let rules = parse(LIST).unwrap();
        let removals: Vec<String> = rules.iter().map(|rule| removal(rule).join(" ")).collect();
        let expected = [
            "--remove --force --allow-principal User:x --allow-host * --operation DescribeConfigs \
             --resource-pattern-type literal --topic a.b",
            "--remove --force --allow-principal User:x --allow-host * --operation Write \
             --resource-pattern-type prefixed --transactional-id t.",
            "--remove --force --deny-principal User:y --deny-host 10.0.0.1 --operation Read \
             --resource-pattern-type literal --topic a.b",
        ];
        assert_eq!(removals, expected);
    }
}
