//! Finds the file that a path names.

use std::collections::BTreeMap;

use super::Files;
use super::source::{Path, Source};

/// The modules of a crate.
pub struct Tree {
    pub sources: BTreeMap<String, Source>,
    /// The file of each module, by the path of the module.
    files: BTreeMap<Vec<String>, String>,
}

impl Tree {
    pub fn new(files: &Files) -> Self {
        Self {
            sources: files.iter().map(|(file, text)| (file.clone(), Source::read(text))).collect(),
            files: files.keys().map(|file| (module_of(file), file.clone())).collect(),
        }
    }

    /// The file with the item that a path in `file` names. `None`: it is in another crate.
    pub fn file_of(&self, file: &str, path: &Path) -> Option<String> {
        self.follow(file, path, &[], &mut vec![])
    }

    /// Follows a path, and then `further` segments. `visited` holds the names that were followed,
    /// since re-exports may be circular.
    fn follow(
        &self,
        file: &str,
        path: &Path,
        further: &[String],
        visited: &mut Vec<(String, String)>,
    ) -> Option<String> {
        let mut module = module_of(file);
        module.extend(path.inside.iter().cloned());
        let mut segments = path.segments.iter().chain(further).cloned().collect::<Vec<_>>();
        match segments[0].as_str() {
            "crate" => {
                module.clear();
                segments.remove(0);
            }
            "self" => {
                segments.remove(0);
            }
            "super" => {
                while segments.first().is_some_and(|segment| segment == "super") {
                    module.pop();
                    segments.remove(0);
                }
            }
            first => {
                let child = [&module[..], &[first.to_owned()]].concat();
                if !self.files.contains_key(&child) {
                    return None;
                }
            }
        }
        Some(self.locate(&module, &segments, visited))
    }

    /// The file of the item that `segments` names, seen from a module.
    fn locate(&self, module: &[String], segments: &[String], visited: &mut Vec<(String, String)>) -> String {
        let file = self.file_with(module);
        let Some((name, further)) = segments.split_first() else { return file };
        let child = [module, std::slice::from_ref(name)].concat();
        if self.files.contains_key(&child) {
            return self.locate(&child, further, visited);
        }
        let source = &self.sources[&file];
        let key = (file.clone(), name.clone());
        if source.items.contains(name) || visited.contains(&key) {
            return file;
        }
        visited.push(key);
        if let Some(path) = source.names.get(name) {
            return self.follow(&file, path, further, visited).unwrap_or(file);
        }
        let mut through_globs = source.globs.iter().filter_map(|glob| self.follow(&file, glob, segments, visited));
        through_globs.find(|found| self.sources[found].items.contains(name)).unwrap_or(file)
    }

    /// The file that contains a module. Modules inside a file have none of their own.
    fn file_with(&self, module: &[String]) -> String {
        let modules = (0..=module.len()).rev().map(|length| &module[..length]);
        modules.filter_map(|module| self.files.get(module)).next().cloned().expect("a crate has a root")
    }
}

/// The path of the module that a file is.
fn module_of(file: &str) -> Vec<String> {
    let name = file.strip_suffix(".rs").unwrap_or(file);
    let name = name.strip_suffix("/mod").unwrap_or(name);
    match name {
        "lib" | "main" => vec![],
        _ => name.split('/').map(str::to_owned).collect(),
    }
}
