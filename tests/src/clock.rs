//! A wall clock that is wrong, for one service at a time. A library is compiled and preloaded into its process, since a clock
//! that leaps on the whole machine would leap for everybody. Linux only.

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
    /// A clock that is wrong by so many seconds.
    pub fn off_by(seconds: i64) -> Self {
        let clock = Self { scratch: Scratch::create("clock").unwrap() };
        let mut gcc = Command::new("gcc");
        gcc.args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"]).arg(clock.library()).arg(SOURCE);
        let compiled = gcc.status().expect("gcc, which the Kafka client is compiled with too");
        assert!(compiled.success(), "{SOURCE} does not compile");
        clock.leap_to(seconds);
        clock
    }

    /// Lets it leap, also while its service runs.
    pub fn leap_to(&self, seconds: i64) {
        // In place: the process has the file mapped, and would die of one that is empty for a moment.
        let file = File::options().write(true).create(true).truncate(false).open(self.offset()).unwrap();
        file.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
    }

    /// What a service is started with to have this clock.
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
