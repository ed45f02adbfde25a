//! Numbers and times as people read them.

use time::OffsetDateTime;
use time::macros::format_description;

/// A whole number with separators: 1,204.
pub fn whole(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if number < 0 { format!("-{text}") } else { text }
}

/// A rate per second: 0.2, 42.6, 1,204.
pub fn rate(rate: f64) -> String {
    if rate < 99.95 { format!("{rate:.1}") } else { whole(rate.round() as i64) }
}

/// A duration in the unit that fits.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{:.0} ms", s * 1000.0),
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 3600.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

/// A size in bytes, in the unit that fits.
pub fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

/// A time of day in UTC, with milliseconds. `time` is in milliseconds since 1970.
pub fn clock(time: i64) -> Option<String> {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(time) * 1_000_000).ok()?;
    time.format(format_description!("[hour]:[minute]:[second].[subsecond digits:3]")).ok()
}

/// The start of a text that may be too long for its place.
pub fn shortened(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        return text.to_owned();
    }
    let start: String = text.chars().take(length - 1).collect();
    format!("{}…", start.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([0, 12, 1_204, 18_201_000, -1_204].map(whole), ["0", "12", "1,204", "18,201,000", "-1,204"]);
        assert_eq!([0.0, 42.64, 1_204.4].map(rate), ["0.0", "42.6", "1,204"]);
        assert_eq!([0.038, 1.25, 90.0, 7_200.0, 864_000.0].map(duration), ["38 ms", "1.2 s", "2 min", "2 h", "10 d"]);
        assert_eq!([412, 2_048, 3_145_728].map(size), ["412 B", "2.0 KiB", "3.0 MiB"]);
        assert_eq!(clock(1_700_000_000_123).unwrap(), "22:13:20.123");
        assert_eq!(shortened("waits for Kafka", 8), "waits f…");
    }
}
