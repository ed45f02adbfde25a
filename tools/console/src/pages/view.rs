//! What the map shows, as text.

use std::collections::BTreeMap;

use serde::Serialize;

/// Everything on the map that changes, as it is shown. Keys name the elements.
#[derive(Clone, Debug, Default, Serialize)]
pub struct View {
    pub texts: BTreeMap<String, String>,
    /// `good`, `wait` or `bad`.
    pub states: BTreeMap<String, &'static str>,
    /// Widths of bars.
    pub widths: BTreeMap<String, i32>,
    /// Pipes through which records flow.
    pub flows: BTreeMap<String, bool>,
    pub processes: Vec<ProcessRow>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ProcessRow {
    pub service: String,
    pub address: String,
    pub state: &'static str,
    pub text: String,
}

impl View {
    pub fn text(&self, key: &str) -> &str {
        self.texts.get(key).map_or("–", String::as_str)
    }

    pub fn state(&self, key: &str) -> &'static str {
        self.states.get(key).copied().unwrap_or_default()
    }

    pub fn width(&self, key: &str) -> i32 {
        self.widths.get(key).copied().unwrap_or_default()
    }

    pub fn flows(&self, key: &str) -> bool {
        self.flows.get(key).copied().unwrap_or_default()
    }
}
