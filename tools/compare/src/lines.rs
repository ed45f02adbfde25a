//! Lines of code of both sides, by one rule: lines of Rust, SQL and Lua that are neither blank nor
//! comments, without the tests at the end of a file.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use testbed::paths::root;

/// Files of services that the synchronous version uses too.
const COMMON: [&str; 3] = ["services/email/src/mail.rs", "services/email/src/smtp", "services/cache/src/valkey.rs"];

/// Of Waybill's services and their migrations.
pub fn of_waybill() -> usize {
    lines_in("services") + lines_in("migrations")
}

pub fn of_synchronous() -> usize {
    lines_in("tests/synchronous") + COMMON.map(lines_in).into_iter().sum::<usize>()
}

/// Of the part of `shared` that only Waybill uses.
pub fn of_messaging() -> usize {
    lines_in("shared/src/messaging")
}

/// What a patch changes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Changed {
    pub new_files: usize,
    pub edited_files: usize,
    /// Lines of code that it adds to new files, and to others.
    pub new_lines: usize,
    pub edited_lines: usize,
}

impl Changed {
    pub fn by(patch: &str) -> Self {
        let text = fs::read_to_string(root().join(patch)).expect("the checkout is complete");
        let mut changed = Self::default();
        for file in text.split("diff --git ").skip(1) {
            let name = file.lines().next().unwrap_or_default();
            let Some(comment) = comment(Path::new(name)) else { continue };
            let added = file.lines().filter(|line| !line.starts_with("+++")).filter_map(|line| line.strip_prefix('+'));
            let lines = code(&added.collect::<Vec<_>>().join("\n"), comment);
            if file.contains("\nnew file mode") {
                changed.new_files += 1;
                changed.new_lines += lines;
            } else {
                changed.edited_files += 1;
                changed.edited_lines += lines;
            }
        }
        changed
    }
}

fn lines_in(path: &str) -> usize {
    lines_of(&root().join(path))
}

fn lines_of(path: &Path) -> usize {
    if path.is_dir() {
        let entries = fs::read_dir(path).expect("the checkout is complete");
        return entries.map(|entry| lines_of(&entry.expect("the checkout is readable").path())).sum();
    }
    let Some(comment) = comment(path) else { return 0 };
    let text = fs::read_to_string(path).expect("the checkout is readable");
    code(&text, comment)
}

/// How a comment begins. `None`: the file is no code.
fn comment(path: &Path) -> Option<&'static str> {
    match path.extension()?.to_str()? {
        "rs" => Some("//"),
        "sql" | "lua" => Some("--"),
        _ => None,
    }
}

fn code(text: &str, comment: &str) -> usize {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    code.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(comment)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_blank_lines_and_tests_are_no_code() {
        assert_eq!(code("//! a\n\n/// b\nfn c() {\n    d(); // e\n}\n#[cfg(test)]\nmod tests {}\n", "//"), 3);
        assert_eq!(code("#[cfg(test)]\nuse b;\nfn c() {}\n", "//"), 3, "only a module of tests ends the code");
        assert_eq!(code("-- a\nselect 1;\n", "--"), 1);
        let changed = Changed::by(crate::added::SYNCHRONOUS_PATCH);
        assert!(changed.new_files == 2 && changed.edited_files == 3, "{changed:?}");
        assert!(of_synchronous() > 0 && of_waybill() > of_synchronous());
    }
}
