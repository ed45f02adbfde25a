//! Where the boxes and pipes of the map are. They follow from the topology: a new service or topic
//! is drawn without a change here.

use topology::{Group, SERVICES, Service};

const WIDTH: i32 = 1200;
const TOP: i32 = 24;
const GAP: i32 = 24;
const TOPIC_HEIGHT: i32 = 44;
/// The height of a partition's bar, with the space after it.
const BAR: i32 = 8;
const LINE: i32 = 20;

/// How many partitions of a topic are drawn. Topics of facts may have more than declared.
pub const PARTITIONS: i32 = 6;
/// The width of a partition's bar.
pub const BAR_WIDTH: i32 = 188;

/// The columns: producers, topics, consumers, and what they store their effects in.
const WRITERS: Column = Column { x: 40, width: 218 };
const TOPICS: Column = Column { x: 400, width: 220 };
const READERS: Column = Column { x: 740, width: 240 };
const STORES: Column = Column { x: 1050, width: 120 };

#[derive(Clone, Copy)]
struct Column {
    x: i32,
    width: i32,
}

pub struct Diagram {
    pub width: i32,
    pub height: i32,
    pub services: Vec<ServiceBox>,
    pub topics: Vec<TopicBox>,
    pub stores: Vec<StoreBox>,
    pub pipes: Vec<Pipe>,
}

pub struct ServiceBox {
    pub name: &'static str,
    pub place: Place,
    /// The lines below the name: the outbox and the consumer groups.
    pub lines: Vec<Line>,
    /// The y coordinate of the line that says what the service waits for.
    pub status: i32,
}

pub struct Line {
    pub label: String,
    pub key: String,
    pub y: i32,
}

pub struct TopicBox {
    pub name: &'static str,
    pub key: String,
    pub color: &'static str,
    pub place: Place,
    pub bars: Vec<Bar>,
}

pub struct Bar {
    pub key: String,
    pub y: i32,
}

pub struct StoreBox {
    pub name: &'static str,
    pub place: Place,
}

pub struct Pipe {
    pub path: String,
    pub color: &'static str,
    /// The key of its live state: whether records flow. Pipes to stores have none.
    pub key: Option<String>,
}

#[derive(Clone, Copy)]
pub struct Place {
    pub x: i32,
    pub y: i32,
    pub width: i32,
    pub height: i32,
}

impl Place {
    pub fn right(&self) -> i32 {
        self.x + self.width
    }

    fn middle(&self) -> i32 {
        self.y + self.height / 2
    }
}

/// The part of a group's name after the name of its service.
fn short(group: &Group) -> &'static str {
    group.name.split_once('.').map_or(group.name, |(_, short)| short)
}

/// One colour per kind of topic.
pub fn color(topic: &str) -> &'static str {
    match topic {
        topic if topic.contains(".state.") => "state",
        topic if topic.starts_with("email.") => "mail",
        _ => "fact",
    }
}

impl Diagram {
    pub fn new() -> Self {
        let (readers, writers): (Vec<_>, Vec<_>) = SERVICES.into_iter().partition(|service| !service.groups.is_empty());
        let mut services = stack(&readers, READERS);
        let mut topics = topics();
        let height = services.iter().map(|service| service.place).chain(topics.iter().map(|topic| topic.place));
        let height = height.map(|place| place.y + place.height).max().unwrap_or(0) + TOP;
        spread(topics.iter_mut().map(|topic| &mut topic.place), height);
        for topic in &mut topics {
            for (index, bar) in (0..).zip(&mut topic.bars) {
                bar.y = topic.place.y + 34 + BAR * index;
            }
        }
        let mut producers = stack(&writers, WRITERS);
        let middle = producers.iter().map(|producer| producer.place.y + producer.place.height).max().unwrap_or(0);
        producers.iter_mut().for_each(|producer| producer.move_down((height - TOP - middle).max(0) / 2));
        services.extend(producers);
        let stores = stores(&readers, &services);
        let pipes = pipes(&services, &topics, &stores);
        Self { width: WIDTH, height, services, topics, stores, pipes }
    }
}

impl ServiceBox {
    fn move_down(&mut self, by: i32) {
        self.place.y += by;
        self.status += by;
        self.lines.iter_mut().for_each(|line| line.y += by);
    }

    /// Where the pipe of a topic meets the box.
    fn line(&self, key: &str) -> i32 {
        self.lines.iter().find(|line| line.key == key).map_or(self.place.middle(), |line| line.y - 4)
    }
}

/// Boxes of services, one below the other.
fn stack(services: &[Service], column: Column) -> Vec<ServiceBox> {
    let mut y = TOP;
    let mut boxes = vec![];
    for service in services {
        let mut lines = vec![];
        let mut line = y + 50;
        if !service.writes.is_empty() {
            lines.push(Line { label: "outbox".to_owned(), key: format!("outbox:{}", service.name), y: line });
            line += LINE;
        }
        for group in service.groups {
            lines.push(Line { label: short(group).to_owned(), key: format!("group:{}", group.name), y: line });
            line += LINE;
        }
        let height = line + 14 - y;
        let place = Place { x: column.x, y, width: column.width, height };
        boxes.push(ServiceBox { name: service.name, place, lines, status: line });
        y += height + GAP;
    }
    boxes
}

fn topics() -> Vec<TopicBox> {
    let height = TOPIC_HEIGHT + BAR * PARTITIONS;
    let names = SERVICES.iter().flat_map(|service| service.writes).copied();
    let boxed = names.enumerate().map(|(index, name)| {
        let y = TOP + index as i32 * (height + GAP);
        let bars = (0..PARTITIONS).map(|partition| Bar { key: format!("lag:{name}:{partition}"), y: 0 });
        let place = Place { x: TOPICS.x, y, width: TOPICS.width, height };
        TopicBox { name, key: format!("topic:{name}"), color: color(name), place, bars: bars.collect() }
    });
    boxed.collect()
}

/// Distributes boxes over a height.
fn spread<'a>(places: impl Iterator<Item = &'a mut Place>, height: i32) {
    let mut places: Vec<&mut Place> = places.collect();
    let used: i32 = places.iter().map(|place| place.height).sum();
    let gap = (height - 2 * TOP - used) / (places.len() as i32 - 1).max(1);
    let mut y = TOP;
    for place in &mut places {
        place.y = y;
        y += place.height + gap;
    }
}

fn stores(readers: &[Service], boxes: &[ServiceBox]) -> Vec<StoreBox> {
    let mut stores: Vec<StoreBox> = vec![];
    for (service, boxed) in readers.iter().zip(boxes) {
        for (index, name) in (0..).zip(service.stores) {
            if stores.iter().all(|store| store.name != *name) {
                let y = boxed.place.y + 52 * index;
                stores.push(StoreBox { name, place: Place { x: STORES.x, y, width: STORES.width, height: 40 } });
            }
        }
    }
    stores
}

fn pipes(services: &[ServiceBox], topics: &[TopicBox], stores: &[StoreBox]) -> Vec<Pipe> {
    let mut pipes = vec![];
    for service in SERVICES {
        let Some(boxed) = services.iter().find(|boxed| boxed.name == service.name) else { continue };
        for topic in topics.iter().filter(|topic| service.writes.contains(&topic.name)) {
            let from = boxed.line(&format!("outbox:{}", service.name));
            let key = Some(format!("writes:{}", topic.name));
            let path = if boxed.place.x < topic.place.x {
                curve(boxed.place.right(), from, topic.place.x, topic.place.middle())
            } else {
                curve(boxed.place.x, from, topic.place.right(), topic.place.middle() + 12)
            };
            pipes.push(Pipe { path, color: topic.color, key });
        }
        for group in service.groups {
            let Some(topic) = topics.iter().find(|topic| topic.name == group.topic) else { continue };
            let to = boxed.line(&format!("group:{}", group.name));
            let path = curve(topic.place.right(), topic.place.middle(), boxed.place.x, to);
            pipes.push(Pipe { path, color: topic.color, key: Some(format!("reads:{}", group.name)) });
        }
        for store in stores.iter().filter(|store| !service.groups.is_empty() && service.stores.contains(&store.name)) {
            let path = curve(boxed.place.right(), boxed.place.middle(), store.place.x, store.place.middle());
            pipes.push(Pipe { path, color: "db", key: None });
        }
    }
    pipes
}

/// A path that leaves and arrives horizontally.
fn curve(x: i32, y: i32, to_x: i32, to_y: i32) -> String {
    let middle = i32::midpoint(x, to_x);
    format!("M{x} {y} C{middle} {y} {middle} {to_y} {to_x} {to_y}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_topic_and_group_is_drawn_and_no_boxes_overlap() {
        let diagram = Diagram::new();
        let groups: usize = SERVICES.iter().map(|service| service.groups.len()).sum();
        let written: usize = SERVICES.iter().map(|service| service.writes.len()).sum();
        assert_eq!(diagram.services.len(), SERVICES.len());
        assert_eq!(diagram.topics.len(), written);
        assert_eq!(diagram.pipes.iter().filter(|pipe| pipe.key.is_some()).count(), groups + written);
        let services = diagram.services.iter().map(|boxed| boxed.place);
        let topics = diagram.topics.iter().map(|boxed| boxed.place);
        let places: Vec<Place> = services.chain(topics).chain(diagram.stores.iter().map(|boxed| boxed.place)).collect();
        for (index, one) in places.iter().enumerate() {
            assert!(one.y >= 0 && one.y + one.height <= diagram.height && one.right() <= diagram.width);
            for other in &places[index + 1..] {
                let apart = one.right() <= other.x || other.right() <= one.x;
                let apart = apart || one.y + one.height <= other.y || other.y + other.height <= one.y;
                assert!(apart, "boxes at {},{} and {},{}", one.x, one.y, other.x, other.y);
            }
        }
    }
}
