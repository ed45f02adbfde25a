//! Splits Rust code into the tokens that imports are made of. Comments, texts and lifetimes are
//! left out.

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    /// An identifier, a keyword or a number.
    Word(String),
    /// `::`
    Separator,
    Symbol(char),
}

pub fn tokens(text: &str) -> Vec<Token> {
    let mut rest = text;
    let mut tokens = vec![];
    while let Some(first) = rest.chars().next() {
        if let Some(skipped) = comment(rest).or_else(|| string(rest)).or_else(|| quote(rest)) {
            rest = &rest[skipped..];
        } else if is_word(first) {
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            tokens.push(Token::Word(rest[..end].to_owned()));
            rest = &rest[end..];
        } else if let Some(after) = rest.strip_prefix("::") {
            tokens.push(Token::Separator);
            rest = after;
        } else {
            if !first.is_whitespace() {
                tokens.push(Token::Symbol(first));
            }
            rest = &rest[first.len_utf8()..];
        }
    }
    tokens
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The length of the comment at the beginning of the text.
fn comment(text: &str) -> Option<usize> {
    if text.starts_with("//") {
        return Some(text.find('\n').unwrap_or(text.len()));
    }
    if !text.starts_with("/*") {
        return None;
    }
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += 1;
        }
    }
    Some(at)
}

/// The length of the string literal at the beginning of the text.
fn string(text: &str) -> Option<usize> {
    raw_string(text).or_else(|| plain_string(text))
}

/// `r"…"`, `r#"…"#`, and the same with `b` or `c` in front.
fn raw_string(text: &str) -> Option<usize> {
    let body = text.strip_prefix(['b', 'c']).unwrap_or(text).strip_prefix('r')?;
    let inside = body.trim_start_matches('#');
    let hashes = body.len() - inside.len();
    let inside = inside.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = inside.find(&end).map_or(inside.len(), |at| at + end.len());
    Some(text.len() - inside.len() + length)
}

/// `"…"`, and the same with `b` or `c` in front.
fn plain_string(text: &str) -> Option<usize> {
    let inside = text.strip_prefix(['b', 'c']).unwrap_or(text).strip_prefix('"')?;
    let mut is_escaped = false;
    for (at, c) in inside.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' => return Some(text.len() - inside.len() + at + 1),
            _ => {}
        }
    }
    Some(text.len())
}

/// The length of the character literal or the lifetime at the beginning of the text.
fn quote(text: &str) -> Option<usize> {
    let body = text.strip_prefix('\'')?;
    let mut chars = body.char_indices();
    let (_, first) = chars.next()?;
    if first == '\\' {
        let (at, _) = chars.skip(1).find(|(_, c)| *c == '\'')?;
        return Some(1 + at + 1);
    }
    match chars.next() {
        Some((at, '\'')) => Some(1 + at + 1),
        _ => Some(1 + body.find(|c| !is_word(c)).unwrap_or(body.len())),
    }
}
