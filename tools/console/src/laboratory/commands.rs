//! Shell commands that the page shows under Docker Compose. A visitor types them in the folder of
//! docker-compose.yml.

use shared::messaging::Coordinates;

/// Lets a tool of Kafka run in the container of the broker, with less memory than the broker.
const IN_KAFKA: &str = "docker compose exec -T -e KAFKA_HEAP_OPTS=-Xmx64m kafka";
const SCALED: &str = "docker compose -f docker-compose.yml -f deploy/compose.scale.yml up -d --no-deps --no-recreate";

/// Writes a record that is not JSON and has no headers.
pub const MALFORMED: &str = "echo 'this is not JSON' | docker compose exec -T -e KAFKA_HEAP_OPTS=-Xmx64m kafka \
                             /opt/kafka/bin/kafka-console-producer.sh --bootstrap-server localhost:9092 --topic \
                             user.events.v1";

/// What to type for each act on a service: its label and the command.
pub fn of_service(service: &str) -> Vec<(&'static str, String)> {
    vec![
        ("Kill", format!("docker compose kill {service}")),
        ("Freeze", format!("docker compose pause {service}")),
        ("Resume", format!("docker compose unpause {service}")),
        ("Restart", format!("docker compose restart {service}")),
        ("Add", format!("{SCALED} --scale {service}=2 {service}")),
        ("Remove", format!("{SCALED} --scale {service}=1 {service}")),
    ]
}

pub fn of_component(component: &str) -> Vec<(&'static str, String)> {
    vec![("Stop", format!("docker compose stop {component}")), ("Start", format!("docker compose start {component}"))]
}

/// Reads a record and writes it again.
pub fn again(Coordinates { topic, partition, offset }: &Coordinates) -> String {
    let tool = |name: &str| {
        format!("/opt/kafka/bin/kafka-console-{name}.sh --bootstrap-server localhost:9092 --topic {topic}")
    };
    let read = format!(
        "{} --partition {partition} --offset {offset} --max-messages 1 --isolation-level read_committed \
         --formatter-property print.headers=true --formatter-property print.key=true --formatter-property \
         headers.separator=%",
        tool("consumer")
    );
    let write = format!(
        "{} --reader-property parse.headers=true --reader-property parse.key=true --reader-property \
         headers.separator=%",
        tool("producer")
    );
    format!("{IN_KAFKA} sh -c '{read} | {write}'")
}
