//! Links to the code.

use std::str::FromStr;

/// The address of a line of code, with `{file}` and `{line}` in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceUrl(String);

impl FromStr for SourceUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_url = text.starts_with("https://") || text.starts_with("http://");
        let is_usable = is_url && text.contains("{file}");
        is_usable
            .then(|| Self(text.to_owned()))
            .ok_or("not a URL with {file} in it, for example https://git.example.com/waybill/blob/main/{file}#L{line}")
    }
}

impl SourceUrl {
    /// `None`: the path is not one of a file in this repository. It comes from a span, so it may be
    /// any text.
    pub fn link(&self, file: &str, line: u32) -> Option<String> {
        let is_part = |part: &str| {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            !part.is_empty() && part != "." && part != ".." && part.bytes().all(is_plain)
        };
        let is_path = file.split('/').all(is_part);
        is_path.then(|| self.0.replace("{file}", file).replace("{line}", &line.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_code_has_a_link_if_its_file_can_be_in_the_repository() {
        let source: SourceUrl = "https://git.example.com/main/{file}#L{line}".parse().unwrap();
        let link = source.link("shared/src/platform/http.rs", 144);
        assert_eq!(link.unwrap(), "https://git.example.com/main/shared/src/platform/http.rs#L144");
        for foreign in
            ["", "/etc/passwd", "../secret.rs", "a//b.rs", "a b.rs", "a\"><img src=x>.rs", "javascript:alert(1)"]
        {
            assert_eq!(source.link(foreign, 1), None, "{foreign}");
        }
        for wrong in ["", "javascript:{file}", "https://git.example.com/main", "{file}"] {
            assert!(wrong.parse::<SourceUrl>().is_err(), "{wrong}");
        }
    }
}
