//! A page of `/metrics`, as Prometheus reads it.

use std::collections::{BTreeMap, BTreeSet};

/// The samples of one scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    /// By the series without braces: its name, and its labels as in the page.
    pub samples: BTreeMap<(String, String), f64>,
    /// The names of series that never fall, except when their process restarts.
    pub counters: BTreeSet<String>,
}

impl Page {
    /// # Panics
    /// A line is not in the text format of OpenMetrics.
    pub fn parse(text: &str) -> Self {
        let mut page = Self::default();
        for line in text.lines() {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                let suffixes: &[&str] = match kind {
                    "counter" => &["_total"],
                    "histogram" => &["_bucket", "_count", "_sum"],
                    _ => &[],
                };
                page.counters.extend(suffixes.iter().map(|suffix| format!("{name}{suffix}")));
            } else if !line.starts_with('#') {
                let (series, value) = sample(line).unwrap_or_else(|| panic!("not a sample: {line}"));
                page.samples.insert(series, value);
            }
        }
        page
    }
}

/// `name{label="value",…} value`, with an exemplar or without one.
fn sample(line: &str) -> Option<((String, String), f64)> {
    let (name, labels, rest) = match line.find(['{', ' '])? {
        at if line[at..].starts_with('{') => {
            let end = at + end_of_labels(&line[at..])?;
            (&line[..at], &line[at + 1..end], &line[end + 1..])
        }
        at => (&line[..at], "", &line[at..]),
    };
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(((name.to_owned(), labels.to_owned()), value))
}

/// Where the closing brace is: not within a value.
fn end_of_labels(text: &str) -> Option<usize> {
    let mut is_quoted = false;
    let mut is_escaped = false;
    for (at, letter) in text.char_indices() {
        match letter {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' => is_quoted = !is_quoted,
            '}' if !is_quoted => return Some(at),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_with_their_labels_and_without_exemplars() {
        let text = "# HELP age Time. {x} 1\n# TYPE age histogram\nage_bucket{g=\"a}\\\"\",le=\"0.1\"} 2 # {trace_id=\"0a\"} 0.05 1.5\n\
                    age_sum{g=\"b\"} 0.25\n# TYPE open gauge\nopen 3\n# EOF\n";
        let page = Page::parse(text);
        let samples: Vec<(&str, &str, f64)> =
            page.samples.iter().map(|((name, labels), value)| (&**name, &**labels, *value)).collect();
        assert_eq!(
            samples,
            [("age_bucket", "g=\"a}\\\"\",le=\"0.1\"", 2.0), ("age_sum", "g=\"b\"", 0.25), ("open", "", 3.0)]
        );
        assert!(page.counters.contains("age_sum") && !page.counters.contains("open"), "{:?}", page.counters);
    }
}
