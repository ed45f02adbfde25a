//! A system whose components ask for TLS and a login, and whose services may do on Kafka only what
//! the topology says.

use std::collections::BTreeSet;

use redis::{Client, TlsCertificates};
use testbed::kafka::{Acls, HeldRule, run_java};
use testbed::process::Logs;
use testbed::secured::Secured;
use testbed::services;
use testbed::stack::Ports;
use testbed::testing;
use topology::SERVICES;
use topology::acls::Rule;

use super::stack::OwnStack;
use super::{System, Valkey};
use crate::kafka::Kafka;
use crate::mail::Mail;

impl System {
    /// No service yet. The rules are applied and the topics exist. Each service logs in as itself.
    /// The tests are operators, for whom nothing is forbidden. `further_users` can log in to Kafka
    /// too.
    pub async fn empty_on_secured_components(further_users: &[&str]) -> Self {
        let ports = Ports::free();
        let secured = |folder: &std::path::Path| {
            Some(Secured::create(&folder.join("credentials"), ports, further_users).unwrap())
        };
        let own = OwnStack::start(ports, secured).await;
        let secured = own.stack.secured.clone().unwrap();
        let databases = own.migrated_databases().await;
        let programs = testing::stack().programs;
        services::prepare_kafka(&programs, &own.stack, &own.fetched, &own.logs).await.unwrap();
        let url = secured.valkey_operator_url();
        let root_cert = Some(std::fs::read(secured.authority()).unwrap());
        let client = Client::build_with_tls(url.as_str(), TlsCertificates { client_tls: None, root_cert }).unwrap();
        let kafka = Kafka::new(own.stack.kafka.address(), String::new());
        let mail = Mail::of(own.stack.sink.clone());
        // The services read the URL from a file. An empty variable counts as unset.
        let valkey = Valkey { client, url: String::new() };
        let mut system = Self::of(kafka, mail, valkey, databases, Some(own));
        for service in SERVICES {
            system.processes.set_own(service, &secured.settings(service));
        }
        system
    }

    pub fn secured(&self) -> &Secured {
        self.own().stack.secured.as_ref().expect("a system on secured components")
    }

    /// The rules that the broker of a secured system holds.
    pub async fn held_rules(&self) -> BTreeSet<HeldRule> {
        self.acls(&self.own().stack.kafka.address()).held().await.unwrap()
    }

    /// Grants these rules, and no others, to their principals.
    pub async fn grant(&self, rules: &BTreeSet<Rule>) {
        self.acls(&self.own().stack.kafka.address()).apply(rules).await.unwrap();
    }

    /// Runs a program of Kafka's jars, and returns whether it succeeded and what it printed.
    pub async fn run_java(&self, name: &str, main_class: &str, arguments: &[&str]) -> (bool, String) {
        let OwnStack { fetched, logs, .. } = self.own();
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let (status, printed) = run_java(fetched, name, main_class, &arguments, logs).await.unwrap();
        (status.success(), printed)
    }

    /// The logs of the components and of the tools.
    pub fn component_logs(&self) -> Logs {
        self.own().logs.clone()
    }

    fn acls<'a>(&'a self, servers: &'a str) -> Acls<'a> {
        let OwnStack { fetched, logs, .. } = self.own();
        Acls { fetched, servers, client: None, logs }
    }

    fn own(&self) -> &OwnStack {
        self.own.as_ref().expect("a system on components of its own")
    }
}
