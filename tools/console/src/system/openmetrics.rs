//! Reads a page of metrics as OpenMetrics text.

use std::collections::BTreeMap;

/// The samples of one process: name, labels, value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(Vec<Sample>);

#[derive(Clone, Debug, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Samples {
    /// Lines that are not samples are left out.
    pub fn parse(page: &str) -> Self {
        Self(page.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
    }

    /// The sum of the samples of this name that have all of these labels. `None`: there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.values(name, labels).reduce(|sum, value| sum + value)
    }

    /// The largest of these samples.
    pub fn max(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.values(name, labels).reduce(f64::max)
    }

    fn values<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> impl Iterator<Item = f64> + 'a {
        let has_labels = |sample: &Sample| {
            labels.iter().all(|(name, value)| sample.labels.get(*name).is_some_and(|given| given == value))
        };
        self.0.iter().filter(move |sample| sample.name == name && has_labels(sample)).map(|sample| sample.value)
    }
}

/// Parses `name{label="value",…} value`. What follows the value, a time or an exemplar, is ignored.
fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// Parses labels up to the closing brace, and returns the rest of the line.
fn labels(mut text: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        text = text.trim_start_matches(',');
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = rest.char_indices();
        let end = loop {
            match characters.next()? {
                (index, '"') => break index,
                (_, '\\') => match characters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.insert(name.to_owned(), value);
        text = &rest[end + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_name_and_labels() {
        let page = "# TYPE lag gauge\nlag{group=\"a\",partition=\"0\"} 3\nlag{group=\"a\",partition=\"1\"} 4\n\
                    lag{group=\"b\",partition=\"0\"} 5\nlag_other 7\nup 1 1700000000\n# EOF\n";
        let samples = Samples::parse(page);
        assert_eq!(samples.sum("lag", &[("group", "a")]), Some(7.0));
        assert_eq!(samples.max("lag", &[]), Some(5.0));
        assert_eq!(samples.sum("lag", &[("group", "c")]), None);
        assert_eq!(samples.sum("up", &[]), Some(1.0));
    }

    #[test]
    fn labels_are_unescaped_and_exemplars_ignored() {
        let page = "age_bucket{group=\"a \\\"b\\\" \\\\ } c\",le=\"0.1\"} 2 # {trace_id=\"abc\"} 0.05\nbroken{x=\"1\nnonsense\n";
        let samples = Samples::parse(page);
        assert_eq!(samples.sum("age_bucket", &[("group", "a \"b\" \\ } c")]), Some(2.0));
        assert_eq!(samples.sum("broken", &[]), None);
    }
}
