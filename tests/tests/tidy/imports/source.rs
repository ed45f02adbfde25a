//! Reads the text of one file: the items that it defines, the names that it imports, and the paths
//! that it uses.

use std::collections::{BTreeMap, BTreeSet};

use super::lexer::{Token, tokens};

/// A path as it is written in the code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    pub segments: Vec<String>,
    /// The modules inside the file that contain the path.
    pub inside: Vec<String>,
    pub reexport: bool,
}

#[derive(Debug, Default)]
pub struct Source {
    /// Every path of the code, without those of tests.
    pub paths: Vec<Path>,
    /// The items that the file defines.
    pub items: BTreeSet<String>,
    /// The names that `use` declarations bring into the file.
    pub names: BTreeMap<String, Path>,
    /// The modules whose names are all imported.
    pub globs: Vec<Path>,
}

impl Source {
    pub fn read(text: &str) -> Self {
        let mut reader = Reader { tokens: tokens(text), at: 0, depth: 0, modules: vec![], source: Self::default() };
        while reader.at < reader.tokens.len() {
            reader.step();
        }
        reader.source
    }
}

const DEFINITIONS: [&str; 10] =
    ["fn", "struct", "enum", "union", "const", "static", "trait", "type", "mod", "macro_rules"];

struct Reader {
    tokens: Vec<Token>,
    at: usize,
    /// Number of open braces.
    depth: usize,
    /// The open modules of the file, with the depth of their contents.
    modules: Vec<(String, usize)>,
    source: Source,
}

impl Reader {
    fn step(&mut self) {
        match &self.tokens[self.at] {
            Token::Symbol('#') if self.is_test_attribute() => self.skip_item(),
            Token::Symbol('{') => self.open(),
            Token::Symbol('}') => self.close(),
            Token::Word(word) if word == "use" && self.symbol(1) != Some('<') => self.declaration(),
            Token::Word(word) if word == "mod" && self.symbol(2) == Some('{') => self.module(),
            Token::Word(word) if DEFINITIONS.contains(&word.as_str()) => self.definition(),
            Token::Word(_) => self.path(),
            _ => self.at += 1,
        }
    }

    fn open(&mut self) {
        self.depth += 1;
        self.at += 1;
    }

    fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        self.modules.retain(|(_, depth)| *depth <= self.depth);
        self.at += 1;
    }

    /// `mod name {`
    fn module(&mut self) {
        self.define();
        let name = self.word(1).unwrap_or_default().to_owned();
        self.modules.push((name, self.depth + 1));
        self.at += 2;
    }

    fn definition(&mut self) {
        self.define();
        self.at += 1;
    }

    /// Notes the item that the keyword at the current token defines, if it is one of the file
    /// itself.
    fn define(&mut self) {
        let named = if self.symbol(1) == Some('!') { 2 } else { 1 };
        if self.depth == 0
            && let Some(name) = self.word(named)
        {
            let name = name.to_owned();
            self.source.items.insert(name);
        }
    }

    /// `use …;`
    fn declaration(&mut self) {
        let reexport = self.is_public();
        self.at += 1;
        self.tree(vec![], reexport);
    }

    /// A use tree: `a::b`, `a::b as c`, `a::{b, c}` or `a::*`.
    fn tree(&mut self, mut segments: Vec<String>, reexport: bool) {
        while let Some(token) = self.tokens.get(self.at).cloned() {
            match token {
                Token::Word(word) if word == "as" => {
                    let alias = self.word(1).unwrap_or_default().to_owned();
                    self.at += 2;
                    return self.import(segments, &alias, reexport);
                }
                Token::Word(word) => {
                    segments.push(word);
                    self.at += 1;
                }
                Token::Separator => self.at += 1,
                Token::Symbol('*') => {
                    self.at += 1;
                    return self.import_all(segments, reexport);
                }
                Token::Symbol('{') => {
                    self.at += 1;
                    return self.branches(&segments, reexport);
                }
                Token::Symbol(_) => break,
            }
        }
        let name = segments.last().cloned().unwrap_or_default();
        self.import(segments, &name, reexport);
    }

    /// The trees inside the braces of a use tree.
    fn branches(&mut self, segments: &[String], reexport: bool) {
        while let Some(token) = self.tokens.get(self.at) {
            match token {
                Token::Symbol('}') => {
                    self.at += 1;
                    return;
                }
                Token::Symbol(',') => self.at += 1,
                _ => self.tree(segments.to_vec(), reexport),
            }
        }
    }

    fn import(&mut self, mut segments: Vec<String>, name: &str, reexport: bool) {
        let mut name = name.to_owned();
        if segments.len() > 1 && segments.last().is_some_and(|last| last == "self") {
            segments.pop();
            if name == "self" {
                name = segments.last().cloned().unwrap_or_default();
            }
        }
        let path = self.with_modules(segments, reexport);
        self.source.names.insert(name, path.clone());
        self.source.paths.push(path);
    }

    fn import_all(&mut self, segments: Vec<String>, reexport: bool) {
        let path = self.with_modules(segments, reexport);
        self.source.globs.push(path.clone());
        self.source.paths.push(path);
    }

    /// A path in the code: `a::b::c`.
    fn path(&mut self) {
        let starts_here = !matches!(self.before(1), Some(Token::Separator | Token::Symbol('$' | '.')));
        let mut segments = vec![self.word(0).unwrap_or_default().to_owned()];
        self.at += 1;
        while self.tokens.get(self.at) == Some(&Token::Separator)
            && let Some(word) = self.word(1)
        {
            segments.push(word.to_owned());
            self.at += 2;
        }
        if starts_here && segments.len() > 1 {
            let path = self.with_modules(segments, false);
            self.source.paths.push(path);
        }
    }

    fn with_modules(&self, segments: Vec<String>, reexport: bool) -> Path {
        Path { segments, inside: self.modules.iter().map(|(name, _)| name.clone()).collect(), reexport }
    }

    /// Whether `pub` or `pub(…)` is before the current token.
    fn is_public(&self) -> bool {
        let mut back = 1;
        if self.before(1) == Some(&Token::Symbol(')')) {
            while self.before(back).is_some_and(|token| *token != Token::Symbol('(')) {
                back += 1;
            }
            back += 1;
        }
        matches!(self.before(back), Some(Token::Word(word)) if word == "pub")
    }

    /// Whether `#[cfg(test)]` begins at the current token.
    fn is_test_attribute(&self) -> bool {
        let attribute = [
            Token::Symbol('#'),
            Token::Symbol('['),
            Token::Word("cfg".to_owned()),
            Token::Symbol('('),
            Token::Word("test".to_owned()),
            Token::Symbol(')'),
            Token::Symbol(']'),
        ];
        self.tokens[self.at..].starts_with(&attribute)
    }

    /// Skips an item with its attributes: to the end of its braces, or to its semicolon.
    fn skip_item(&mut self) {
        let mut open = 0_usize;
        let mut is_import = false;
        while let Some(token) = self.tokens.get(self.at) {
            self.at += 1;
            match token {
                Token::Word(word) if word == "use" && open == 0 => is_import = true,
                Token::Symbol('{' | '(' | '[') => open += 1,
                Token::Symbol(')' | ']') => open -= 1,
                Token::Symbol('}') => {
                    open -= 1;
                    if open == 0 && !is_import {
                        return;
                    }
                }
                Token::Symbol(';') if open == 0 => return,
                _ => {}
            }
        }
    }

    fn before(&self, back: usize) -> Option<&Token> {
        self.at.checked_sub(back).and_then(|at| self.tokens.get(at))
    }

    fn word(&self, ahead: usize) -> Option<&str> {
        match self.tokens.get(self.at + ahead)? {
            Token::Word(word) => Some(word),
            _ => None,
        }
    }

    fn symbol(&self, ahead: usize) -> Option<char> {
        match self.tokens.get(self.at + ahead)? {
            Token::Symbol(symbol) => Some(*symbol),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(text: &str) -> Vec<String> {
        Source::read(text).paths.iter().map(|path| path.segments.join("::")).collect()
    }

    #[test]
    fn use_trees_are_read_to_their_leaves() {
        let text = "use crate::a::{self, b::{C, D as E}, f::*}; pub(crate) use super::g;";
        assert_eq!(paths(text), ["crate::a", "crate::a::b::C", "crate::a::b::D", "crate::a::f", "super::g"]);
        let source = Source::read(text);
        assert_eq!(source.names.keys().collect::<Vec<_>>(), ["C", "E", "a", "g"]);
        let reexports: Vec<bool> = source.paths.iter().map(|path| path.reexport).collect();
        assert_eq!(reexports, [false, false, false, false, true]);
    }

    #[test]
    fn paths_in_the_code_are_found_and_those_in_texts_and_comments_are_not() {
        let text = r##"
            // crate::comment::A
            /* crate::comment::B /* crate::comment::C */ */
            fn f<'a>(x: &'a crate::a::B) -> Vec<super::c::D> {
                let texts = ["crate::text::E", r#"crate::text::"F""#];
                let quote = ('"', '\'', b'"');
                x.map(self::g::h).$crate::i::j
            }"##;
        assert_eq!(paths(text), ["crate::a::B", "super::c::D", "self::g::h"]);
    }

    #[test]
    fn tests_are_skipped() {
        let text = "
            #[cfg(test)] use crate::a::B;
            #[cfg(test)]
            mod tests { use super::*; fn f() { crate::c::d() } }
            use crate::e::F;";
        assert_eq!(paths(text), ["crate::e::F"]);
    }

    #[test]
    fn a_path_knows_the_modules_of_its_file() {
        let source = Source::read("mod a { use super::super::B; } use super::C;");
        assert_eq!(source.paths[0].inside, ["a"]);
        assert_eq!(source.paths[1].inside, [""; 0]);
        assert_eq!(source.items.into_iter().collect::<Vec<_>>(), ["a"]);
    }
}
