//! Random passwords, kept in a file: what they protect keeps its data, and so must keep its
//! passwords.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use uuid::Uuid;

/// The password of each name.
#[derive(Clone, Debug, Default)]
pub struct Passwords(BTreeMap<String, String>);

impl Passwords {
    /// Reads the file, and adds a random password for each name that has none. Only its owner may
    /// read the file.
    pub fn in_file(file: &Path, names: impl IntoIterator<Item = String>) -> Result<Self> {
        let stored = if file.exists() {
            fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?
        } else {
            String::new()
        };
        let lines = stored.lines().filter_map(|line| line.split_once(' '));
        let mut passwords: BTreeMap<String, String> =
            lines.map(|(name, password)| (name.to_owned(), password.to_owned())).collect();
        for name in names {
            passwords.entry(name).or_insert_with(random);
        }
        let text: String = passwords.iter().map(|(name, password)| format!("{name} {password}\n")).collect();
        let opened = File::options().write(true).create(true).truncate(true).mode(0o600).open(file);
        let written = opened.and_then(|mut opened| opened.write_all(text.as_bytes()));
        written.with_context(|| format!("cannot write {}", file.display()))?;
        Ok(Self(passwords))
    }

    /// # Panics
    /// The name was not given to [`Passwords::in_file`].
    pub fn of(&self, name: &str) -> &str {
        self.0.get(name).unwrap_or_else(|| panic!("bug: no password is kept for {name}"))
    }

    /// All names with their passwords.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, password)| (name.as_str(), password.as_str()))
    }
}

/// 122 random bits. Contains no character that a URL, a shell or a file of settings reserves.
fn random() -> String {
    Uuid::new_v4().simple().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_kept_and_a_new_name_gets_one() {
        let file = std::env::temp_dir().join(format!("passwords-{}", std::process::id()));
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let first = Passwords::in_file(&file, names(&["a"])).unwrap();
        let second = Passwords::in_file(&file, names(&["a", "b"])).unwrap();
        fs::remove_file(&file).unwrap();
        assert_eq!(second.of("a"), first.of("a"));
        assert_ne!(second.of("b"), second.of("a"));
        assert_eq!(second.of("b").len(), 32);
    }
}
