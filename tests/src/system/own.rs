//! Components of the test's own, which it may break.

use testbed::kafka::Kafka;
use testbed::postgres::{Durability, Postgres};
use testbed::process::{Logs, Scratch};
use testbed::redis::Redis;
use testbed::stack::Stack;
use testbed::testing::{free_port, prefix};
use topology::Service;

use super::System;
use crate::proxy::Proxy;

/// A component of the test's own. The other components are shared.
pub struct Own<T> {
    pub component: T,
    _scratch: Scratch,
}

impl System {
    /// The components of a system that has its own.
    pub fn components(&mut self) -> &mut Stack {
        &mut self.own.as_mut().expect("a system on components of its own").stack
    }

    /// A broker of a system on three brokers. They are numbered from 1.
    pub fn broker(&mut self, id: i32) -> &mut Kafka {
        self.components().brokers().find(|broker| broker.id == id).expect("brokers are numbered from 1")
    }

    /// Gives the cache a Valkey of its own.
    pub async fn own_valkey(&mut self) -> Own<Redis> {
        let valkey = Self::another_valkey().await;
        self.stores.set_valkey(valkey.component.url());
        self.processes.set("VALKEY_URL", &valkey.component.url());
        valkey
    }

    /// A Valkey with further flags that no service uses yet. The tests use its plain port.
    pub async fn own_valkey_with(&mut self, flags: &[String]) -> Own<Redis> {
        let valkey = Self::start_valkey(flags).await;
        self.stores.set_valkey(valkey.component.url());
        valkey
    }

    /// A Valkey that no service uses yet.
    pub async fn another_valkey() -> Own<Redis> {
        Self::start_valkey(&[]).await
    }

    async fn start_valkey(flags: &[String]) -> Own<Redis> {
        let scratch = Scratch::create("own-valkey").unwrap();
        let logs = Logs::to_files(&format!("tests/valkey-{}", prefix())).unwrap();
        let fetched = testbed::fetch::fetch().await.unwrap();
        let component = Redis::start_with(&fetched, scratch.path(), free_port(), flags, &logs).await.unwrap();
        Own { component, _scratch: scratch }
    }

    /// Gives the services a Postgres of their own.
    pub async fn own_postgres(&mut self) -> Own<Postgres> {
        let scratch = Scratch::create("own-postgres").unwrap();
        let logs = Logs::to_files(&format!("tests/postgres-{}", prefix())).unwrap();
        let fetched = testbed::fetch::fetch().await.unwrap();
        let component =
            Postgres::start(&fetched, scratch.path(), free_port(), Durability::Process, &logs).await.unwrap();
        for service in topology::with_database() {
            let database = component.database(service);
            database.migrate(service).await.unwrap();
            self.processes.set(&service.database_url_setting(), &database.url);
            self.stores.set_database(service, database);
        }
        Own { component, _scratch: scratch }
    }

    /// Gives the services a Kafka of their own. It has a second listener, to which the proxy
    /// forwards: a broker directs its clients to the listener that they used first.
    pub async fn own_kafka(&mut self) -> (Own<Kafka>, Proxy) {
        let scratch = Scratch::create("own-kafka").unwrap();
        let logs = Logs::to_files(&format!("tests/kafka-{}", prefix())).unwrap();
        let fetched = testbed::fetch::fetch().await.unwrap();
        let direct = free_port();
        let proxied = free_port();
        let controller = free_port();
        let proxy = Proxy::before(&format!("127.0.0.1:{proxied}")).await;
        let settings = format!(
            "listeners=PLAINTEXT://127.0.0.1:{direct},PROXIED://127.0.0.1:{proxied},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{direct},PROXIED://{}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
controller.quorum.voters=1@127.0.0.1:{controller}",
            proxy.address()
        );
        let component = Kafka::start(&fetched, scratch.path(), direct, &settings, &logs).await.unwrap();
        self.kafka.address = component.address();
        self.processes.set("KAFKA_BROKERS", &component.address());
        (Own { component, _scratch: scratch }, proxy)
    }

    /// Gives the tests a Kafka of their own with these listeners and further lines of
    /// server.properties. The tests use the plaintext listener on this port. The services get no
    /// address.
    pub async fn own_kafka_on(&mut self, port: u16, settings: &str) -> Own<Kafka> {
        let scratch = Scratch::create("own-kafka").unwrap();
        let logs = Logs::to_files(&format!("tests/kafka-{}", prefix())).unwrap();
        let fetched = testbed::fetch::fetch().await.unwrap();
        let component = Kafka::start(&fetched, scratch.path(), port, settings, &logs).await.unwrap();
        self.kafka.address = component.address();
        Own { component, _scratch: scratch }
    }

    /// A proxy in front of a service's database, and the setting that makes the service use it.
    pub async fn proxied_database(&self, service: Service) -> (Proxy, (String, String)) {
        let name = service.database_url_setting();
        let (proxy, through) = Proxy::before_url(self.processes.setting(&name)).await;
        (proxy, (name, through))
    }
}
