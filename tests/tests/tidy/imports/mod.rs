//! Which files of a crate import each other, read from their `use` declarations and from the paths
//! in their code.
//!
//! The code is read as tokens, not parsed, so a path made by a macro is not seen. An item that is
//! imported through a re-export counts as an import of the file that defines it.

mod graph;
mod lexer;
mod resolve;
mod source;

pub use graph::{cycles, upward};

use std::collections::BTreeMap;

/// The sources of a crate: path below `src/`, and text.
pub type Files = BTreeMap<String, String>;

/// One file uses an item of another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Import {
    pub from: String,
    pub to: String,
    /// The path as it is written in the code.
    pub path: String,
    pub reexport: bool,
}

/// Every import between two files of a crate, without those of its test modules.
pub fn imports(files: &Files) -> Vec<Import> {
    let tree = resolve::Tree::new(files);
    let mut imports = vec![];
    for (file, source) in &tree.sources {
        for path in &source.paths {
            if let Some(to) = tree.file_of(file, path)
                && to != *file
            {
                let path_text = path.segments.join("::");
                imports.push(Import { from: file.clone(), to, path: path_text, reexport: path.reexport });
            }
        }
    }
    imports.sort();
    imports.dedup();
    imports
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree<const N: usize>(files: [(&str, &str); N]) -> Vec<Import> {
        imports(&files.map(|(file, text)| (file.to_owned(), text.to_owned())).into())
    }

    /// `from -> to` of each import.
    fn edges(imports: &[Import]) -> Vec<String> {
        imports.iter().map(|import| format!("{} -> {}", import.from, import.to)).collect()
    }

    #[test]
    fn two_files_that_import_each_other_are_a_cycle() {
        let imports = tree([
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use crate::b::B; pub struct A;"),
            ("b.rs", "pub struct B; fn f(a: super::a::A) {}"),
        ]);
        assert_eq!(cycles(&imports), ["a.rs -> b.rs (crate::b::B) -> a.rs (super::a::A)"]);
    }

    #[test]
    fn a_longer_cycle_is_found() {
        let imports = tree([
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b;"),
            ("b.rs", "use crate::{c::{self, C}};"),
            ("c.rs", "fn f() { crate::a::g() } pub struct C;"),
        ]);
        assert_eq!(cycles(&imports).len(), 1);
        assert_eq!(edges(&imports), ["a.rs -> b.rs", "b.rs -> c.rs", "b.rs -> c.rs", "c.rs -> a.rs"]);
    }

    #[test]
    fn every_cycle_of_a_crate_is_listed() {
        let imports = tree([
            ("lib.rs", "mod a; mod b; mod c; mod d;"),
            ("a.rs", "use crate::b::B;"),
            ("b.rs", "use crate::a::A;"),
            ("c.rs", "use crate::d::D;"),
            ("d.rs", "use crate::c::C;"),
        ]);
        assert_eq!(cycles(&imports).len(), 2);
    }

    #[test]
    fn a_parent_that_calls_a_child_which_imports_the_parent_is_a_cycle() {
        let imports = tree([
            ("main.rs", "mod a;"),
            ("a/mod.rs", "mod b; struct A; fn f() { b::g() }"),
            ("a/b.rs", "use super::A; pub fn g() {}"),
        ]);
        assert_eq!(cycles(&imports), ["a/b.rs -> a/mod.rs (super::A) -> a/b.rs (b::g)"]);
    }

    #[test]
    fn declarations_reexports_and_tests_make_no_cycle() {
        let imports = tree([
            ("lib.rs", "pub mod a; mod b; pub use a::A; pub(crate) use b::B;"),
            ("a.rs", "use crate::b::B; pub struct A; #[cfg(test)] mod tests { use crate::b::f; }"),
            ("b.rs", "pub struct B; pub fn f() {} #[cfg(test)] mod tests { use crate::a::A; }"),
        ]);
        assert_eq!(cycles(&imports), [""; 0]);
    }

    #[test]
    fn an_item_is_in_the_file_that_defines_it_not_in_the_one_that_reexports_it() {
        let files = [
            ("lib.rs", "mod a; mod z;"),
            ("a/mod.rs", "mod b; mod c; pub use b::{B as Renamed, deep::D}; pub use c::*;"),
            ("a/b/mod.rs", "pub mod deep; pub enum B { One }"),
            ("a/b/deep.rs", "pub struct D;"),
            ("a/c.rs", "pub const C: u8 = 0;"),
        ];
        let uses = [
            ("use crate::a::Renamed;", "a/b/mod.rs"),
            ("use crate::a::Renamed::One;", "a/b/mod.rs"),
            ("use crate::a::D;", "a/b/deep.rs"),
            ("use crate::a::C;", "a/c.rs"),
            ("use crate::a;", "a/mod.rs"),
            ("use crate::a::*;", "a/mod.rs"),
            ("use crate::a::made_by_a_macro;", "a/mod.rs"),
            ("mod inside { use super::super::a::D; }", "a/b/deep.rs"),
            ("use super::a::b::deep;", "a/b/deep.rs"),
        ];
        for (code, expected) in uses {
            let mut files: Files = files.map(|(file, text)| (file.to_owned(), text.to_owned())).into();
            files.insert("z.rs".to_owned(), code.to_owned());
            let found: Vec<String> = imports(&files).into_iter().filter(|i| i.from == "z.rs").map(|i| i.to).collect();
            assert_eq!(found, [expected], "{code}");
        }
    }

    #[test]
    fn other_crates_and_a_file_itself_are_no_imports() {
        let imports = tree([
            ("lib.rs", "mod a;"),
            (
                "a.rs",
                "use std::fmt; use serde::Serialize; use self::b::B; mod b { pub struct B; } fn f() -> std::io::Result<()> {}",
            ),
        ]);
        assert_eq!(edges(&imports), [""; 0]);
    }

    #[test]
    fn circular_reexports_come_to_an_end() {
        let imports = tree([
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "pub use crate::b::Ghost; pub use crate::b::*;"),
            ("b.rs", "pub use crate::a::Ghost; pub use crate::a::*;"),
            ("c.rs", "use crate::a::Ghost; use crate::a::Other;"),
        ]);
        assert_eq!(edges(&imports).len(), 6);
    }

    #[test]
    fn an_import_of_a_later_layer_is_found_and_one_of_an_earlier_layer_allowed() {
        let layers = ["base", "middle", "top"];
        let files = [
            ("lib.rs", "pub mod base; pub mod middle; pub mod top; pub use top::Top;"),
            ("base.rs", "fn f() { crate::middle::deep::g() }"),
            ("middle/mod.rs", "pub mod deep; pub use crate::top::Top;"),
            ("middle/deep.rs", "use crate::base; use super::other; pub fn g() {}"),
            ("top.rs", "use crate::base::f; use crate::middle::deep; pub struct Top;"),
        ];
        let expected = [
            "base.rs imports crate::middle::deep::g from the later layer middle",
            "middle/mod.rs imports crate::top::Top from the later layer top",
        ];
        assert_eq!(upward(&tree(files), &layers), expected);
        let stray = tree([("lib.rs", "mod stray; mod base;"), ("stray.rs", "use crate::base::A;"), ("base.rs", "")]);
        assert_eq!(upward(&stray, &layers), ["stray.rs is in no layer"]);
    }
}
