//! Parsers of settings.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Parses a number within a range, for clap's `value_parser`. Clap's own parser does not name the
/// range if the text is not a number, or is a number that does not fit into the type. Name the type
/// of the field: `number::<u16>(1..=64)`. Clap compares the types only when the program starts.
pub fn number<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    move |text| match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("it must be a whole number from {} to {}", range.start(), range.end())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_outside_its_range_is_refused_with_the_range() {
        let parse = number::<u32>(10..=600_000);
        assert_eq!(parse("10"), Ok(10));
        assert_eq!(parse("600000"), Ok(600_000));
        for text in ["9", "600001", "-1", "0x10", "1.5", "", " 10", "4294967306", "300000000000000000000"] {
            assert_eq!(parse(text), Err("it must be a whole number from 10 to 600000".to_owned()), "{text}");
        }
    }
}
