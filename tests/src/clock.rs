//! A wrong wall clock for one service. It is a library that is compiled and preloaded into the
//! process, since a change of the machine's clock would affect every process. Linux only.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use testbed::process::Scratch;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/clock.c");

pub struct Clock {
    scratch: Scratch,
}

impl Clock {
    /// A clock that differs from the real time by this number of seconds.
    pub fn off_by(seconds: i64) -> Self {
        let clock = Self { scratch: Scratch::create("clock").unwrap() };
        let mut gcc = Command::new("gcc");
        gcc.args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"]).arg(clock.library()).arg(SOURCE);
        let compiled = gcc.status().expect("gcc is installed, since the Kafka client is compiled with it");
        assert!(compiled.success(), "{SOURCE} does not compile");
        clock.jump_to(seconds);
        clock
    }

    /// Makes the clock jump to another offset, even while its service runs.
    pub fn jump_to(&self, seconds: i64) {
        // The process has the file mapped. It would crash if the file were empty for a moment, so
        // we write in place.
        let file = File::options().write(true).create(true).truncate(false).open(self.offset()).unwrap();
        file.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
    }

    /// The variables that give a service this clock.
    pub fn settings(&self) -> [(String, String); 2] {
        let text = |path: PathBuf| path.into_os_string().into_string().unwrap();
        [("LD_PRELOAD".to_owned(), text(self.library())), ("CLOCK_OFFSET".to_owned(), text(self.offset()))]
    }

    fn library(&self) -> PathBuf {
        self.scratch.path().join("clock.so")
    }

    fn offset(&self) -> PathBuf {
        self.scratch.path().join("offset")
    }
}
