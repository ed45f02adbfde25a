//! Scrapes as the `input_series` of promtool, on a time axis that is stretched: one scrape a second
//! becomes one in several minutes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::page::Page;

/// What one scrape found, by job and instance. `None`: the process accepted the connection and did
/// not answer. A process without an entry does not exist.
pub type Scrape = BTreeMap<(&'static str, String), Option<Page>>;

/// Turns the samples of series with these names into promtool's notation, with one value a minute.
/// `minutes` says for each scrape how long it is until the next one. In between a counter grows
/// evenly, and another value stays as it is. A series that disappears becomes stale, as in
/// Prometheus.
pub fn input_series(scrapes: &[Scrape], names: &BTreeSet<String>, minutes: &[usize]) -> Vec<(String, String)> {
    let mut series: BTreeMap<String, Vec<Option<f64>>> = BTreeMap::new();
    let mut counters = BTreeSet::new();
    for (index, scrape) in scrapes.iter().enumerate() {
        for ((job, instance), page) in scrape {
            let target = format!("job=\"{job}\",instance=\"{instance}\"");
            let up = format!("up{{{target}}}");
            let mut samples = vec![(up, if page.is_some() { 1.0 } else { 0.0 })];
            for ((name, labels), value) in page.iter().flat_map(|page| &page.samples) {
                let comma = if labels.is_empty() { "" } else { "," };
                samples.push((format!("{name}{{{target}{comma}{labels}}}"), *value));
            }
            counters.extend(page.iter().flat_map(|page| page.counters.iter().cloned()));
            for (key, value) in samples.into_iter().filter(|(key, _)| names.contains(name_of(key))) {
                series.entry(key).or_insert_with(|| vec![None; scrapes.len()])[index] = Some(value);
            }
        }
    }
    let notation = |(key, values): (String, Vec<Option<f64>>)| {
        let is_counter = counters.contains(name_of(&key));
        (key, notation(&values, is_counter, minutes))
    };
    series.into_iter().map(notation).collect()
}

fn name_of(series: &str) -> &str {
    series.split('{').next().unwrap_or_default()
}

fn notation(values: &[Option<f64>], is_counter: bool, minutes: &[usize]) -> String {
    let mut text = String::new();
    for (index, (value, minutes)) in values.iter().zip(minutes).enumerate() {
        let next = values.get(index + 1).copied().flatten();
        let last = minutes - 1;
        let separator = if index == 0 { "" } else { " " };
        text.push_str(separator);
        let written = match (value, next) {
            (Some(value), Some(next)) if is_counter && next > *value => {
                write!(text, "{value}+{}x{last}", (next - value) / *minutes as f64)
            }
            (Some(value), _) => write!(text, "{value}+0x{last}"),
            (None, _) if index > 0 && values[index - 1].is_some() => write!(text, "stale _x{last}"),
            (None, _) => write!(text, "_x{minutes}"),
        };
        written.expect("writing to a string does not fail");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrape(text: &str) -> Scrape {
        [(("user", "one".to_owned()), Some(Page::parse(text)))].into()
    }

    #[test]
    fn counters_grow_evenly_and_series_that_disappear_become_stale() {
        let page = |count: u32, open: &str| format!("# TYPE done counter\ndone_total {count}\n{open}");
        let scrapes = [
            scrape(&page(1, "")),
            scrape(&page(4, "open{a=\"b\"} 2\n")),
            scrape(&page(4, "open{a=\"b\"} 5\n")),
            scrape(&page(0, "")),
            [(("user", "one".to_owned()), None)].into(),
            Scrape::new(),
        ];
        let names = ["done_total", "open", "up"].map(str::to_owned).into();
        let found = input_series(&scrapes, &names, &[3, 2, 3, 3, 3, 3]);
        let target = "job=\"user\",instance=\"one\"";
        let expected = [
            (format!("done_total{{{target}}}"), "1+1x2 4+0x1 4+0x2 0+0x2 stale _x2 _x3"),
            (format!("open{{{target},a=\"b\"}}"), "_x3 2+0x1 5+0x2 stale _x2 _x3 _x3"),
            (format!("up{{{target}}}"), "1+0x2 1+0x1 1+0x2 1+0x2 0+0x2 stale _x2"),
        ];
        let expected: Vec<(String, String)> = expected.into_iter().map(|(key, text)| (key, text.to_owned())).collect();
        assert_eq!(found, expected);
    }
}
