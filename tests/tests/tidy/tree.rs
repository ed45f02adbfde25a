//! The files of the checkout, and their code without comments and tests.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

pub fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The files below a folder of the checkout whose name has this ending: path from the root, and
/// text.
pub fn files(folder: &str, ending: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_str().unwrap().ends_with(ending) {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    assert!(!found.is_empty(), "no {ending} in {folder}: the rule checks nothing");
    found
}

/// The production code: the files of the services and of `shared`.
pub fn sources() -> impl Iterator<Item = (String, String)> {
    files("services", ".rs").into_iter().chain(files("shared", ".rs"))
}

/// The production files that mention any of `words` outside comments and tests.
pub fn mentioning(words: &[&str]) -> Vec<String> {
    let mentions = |text: &str| code(text).any(|line| words.iter().any(|word| line.contains(word)));
    sources().filter(|(_, text)| mentions(text)).map(|(path, _)| path).collect()
}

/// The lines of a file without its comments, and without the tests at its end.
pub fn code(text: &str) -> impl Iterator<Item = &str> {
    let text = text.split("#[cfg(test)]").next().unwrap();
    text.lines().filter_map(|line| line.split("// ").next()).filter(|line| !line.trim_start().starts_with("//"))
}
