//! A folder of logs, one file per process; merged on the terminal with the process's name in front where that is wanted.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{paths, say::say};

#[derive(Clone)]
pub struct Logs {
    folder: PathBuf,
    on_terminal: bool,
}

impl Logs {
    /// An empty `target/local/logs/<run>`.
    pub fn fresh(run: &str, on_terminal: bool) -> Result<Self> {
        let folder = paths::local().join("logs").join(run);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { folder, on_terminal })
    }

    /// The same files, for a tool whose output interests nobody while it works.
    pub fn off_terminal(&self) -> Self {
        Self { on_terminal: false, ..self.clone() }
    }

    pub fn on_terminal(&self) -> bool {
        self.on_terminal
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    /// Opened for appending: a process that is started again goes on in the same file.
    pub(super) fn open(&self, name: &str) -> Result<Log> {
        let path = self.file(name);
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Log { file, prefix: self.on_terminal.then(|| format!("{name:<9} │ ")) })
    }
}

pub(super) struct Log {
    file: File,
    prefix: Option<String>,
}

impl Log {
    /// Until every writer of the pipe is gone. A log that cannot be written must not stop the process that writes it.
    pub(super) fn copy(&mut self, from: impl Read) {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let _ = self.file.write_all(&line);
            if let Some(prefix) = &self.prefix {
                say(format_args!("{prefix}{}", String::from_utf8_lossy(&line).trim_end()));
            }
            line.clear();
        }
    }
}
