//! The rules on imports: no cycles, and none from an earlier layer to a later one.

use std::collections::{BTreeMap, VecDeque};

use super::Import;

/// A cycle for each set of files that import each other:
/// `a.rs -> b.rs (b::Name) -> a.rs (a::Name)`. Re-exports do not count.
pub fn cycles(imports: &[Import]) -> Vec<String> {
    let mut edges: BTreeMap<&str, BTreeMap<&str, &str>> = BTreeMap::new();
    for import in imports.iter().filter(|import| !import.reexport) {
        edges.entry(&import.from).or_default().entry(&import.to).or_insert(&import.path);
    }
    let mut cycles = vec![];
    while let Some(cycle) = edges.keys().filter_map(|file| shortest_cycle(&edges, file)).min_by_key(Vec::len) {
        let mut text = cycle[0].to_owned();
        for (from, to) in cycle.iter().zip(&cycle[1..]) {
            text += &format!(" -> {to} ({})", edges[from][to]);
        }
        cycles.push(text);
        // One edge less, so that the next cycle is another one.
        edges.get_mut(cycle[0]).expect("an edge of the cycle").remove(cycle[1]);
    }
    cycles
}

/// The files of the shortest cycle through `start`, which is the first and the last of them.
fn shortest_cycle<'a>(edges: &BTreeMap<&'a str, BTreeMap<&'a str, &'a str>>, start: &'a str) -> Option<Vec<&'a str>> {
    let mut from: BTreeMap<&str, &str> = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(file) = queue.pop_front() {
        for &next in edges.get(file).into_iter().flat_map(BTreeMap::keys) {
            if next == start {
                let mut cycle = vec![start];
                let mut file = file;
                while file != start {
                    cycle.push(file);
                    file = from[file];
                }
                cycle.push(start);
                cycle.reverse();
                return Some(cycle);
            }
            if !from.contains_key(next) {
                from.insert(next, file);
                queue.push_back(next);
            }
        }
    }
    None
}

/// The imports by which a file uses a later layer. The layers are the files and folders at the top
/// of the crate, in their order. The root of the crate declares them and is in none.
pub fn upward(imports: &[Import], layers: &[&str]) -> Vec<String> {
    let position = |file: &str| layers.iter().position(|layer| *layer == layer_of(file));
    let mut found = vec![];
    for import in imports.iter().filter(|import| layer_of(&import.from) != "lib") {
        let Import { from, to, path, .. } = import;
        match (position(from), position(to)) {
            (Some(lower), Some(upper)) if upper <= lower => {}
            (Some(_), Some(_)) => found.push(format!("{from} imports {path} from the later layer {}", layer_of(to))),
            (None, _) => found.push(format!("{from} is in no layer")),
            (_, None) => found.push(format!("{from} imports {path} from {to}, which is in no layer")),
        }
    }
    found.dedup();
    found
}

fn layer_of(file: &str) -> &str {
    let first = file.split('/').next().unwrap_or(file);
    first.strip_suffix(".rs").unwrap_or(first)
}
