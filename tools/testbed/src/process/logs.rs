//! A folder of logs with one file per process. On request, the lines of all processes are also
//! printed on the terminal, each with the name of its process in front.

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
    /// Logs to files only. Empties and uses the folder `target/local/logs/<run>`.
    pub fn to_files(run: &str) -> Result<Self> {
        let folder = paths::local().join("logs").join(run);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { folder, on_terminal: false })
    }

    /// As [`Logs::to_files`], and prints the lines on the terminal too.
    pub fn to_files_and_terminal(run: &str) -> Result<Self> {
        Ok(Self { on_terminal: true, ..Self::to_files(run)? })
    }

    /// Logs to the same files and not on the terminal, for a tool whose output matters only when it
    /// fails.
    pub fn off_terminal(&self) -> Self {
        Self { on_terminal: false, ..self.clone() }
    }

    pub fn on_terminal(&self) -> bool {
        self.on_terminal
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The log file of the process with this name.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    /// Opens the file for appending: a restarted process continues the same file.
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
    /// Copies lines until every writer of the pipe has closed it. Write errors are ignored: if this
    /// stopped reading the pipe, the process that writes to it would block.
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
