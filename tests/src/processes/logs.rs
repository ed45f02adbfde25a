//! What the processes logged and printed.

use std::fs;
use std::path::{Path, PathBuf};

use testbed::process::Logs;
use topology::Service;

use super::Processes;
use crate::waiting::eventually;

impl Processes {
    /// The log of a service's first process, over all its starts.
    pub fn log(&self, service: Service) -> String {
        fs::read_to_string(self.logs.file(service.name)).unwrap_or_default()
    }

    /// Waits until the log of a service's first process contains this text.
    pub async fn until_logged(&self, service: Service, text: &str) {
        let what = format!("{} logs {text:?}", service.name);
        eventually(&what, async || self.log(service).contains(text).then_some(())).await;
    }

    /// How often the consumers of a service's first process were given or lost partitions, by its
    /// log.
    pub fn rebalances(&self, service: Service) -> usize {
        self.log(service).matches("rebalanced").count()
    }

    /// What all runs of a subcommand printed, see [`Processes::spawn_subcommand`].
    pub fn printed(&self, subcommand: &str) -> String {
        fs::read_to_string(self.logs.file(subcommand)).unwrap_or_default()
    }

    /// What all processes logged and printed, including copies and subcommands: the name of each
    /// log, and its text.
    pub fn all_logs(&self) -> Vec<(String, String)> {
        let copies = self.copies_logs.lock().unwrap();
        let folders = copies.iter().chain([&self.logs]).map(Logs::folder);
        let files = folders.flat_map(|folder| fs::read_dir(folder).unwrap()).map(|entry| entry.unwrap().path());
        let logs = files.filter(|file| file.extension().is_some_and(|extension| extension == "log"));
        let read = |file: PathBuf| {
            let name = file.file_stem().unwrap().to_string_lossy().into_owned();
            (name, String::from_utf8_lossy(&fs::read(file).unwrap()).into_owned())
        };
        logs.map(read).collect()
    }

    /// The folder of the logs.
    pub fn folder(&self) -> &Path {
        self.logs.folder()
    }

    /// A path in the folder of the logs, for a file of the test.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }
}
