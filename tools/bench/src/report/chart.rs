//! Bar charts as SVG. The colours work on a light and on a dark page.

use std::fmt::Write;

/// One bar.
pub struct Bar {
    pub name: String,
    pub value: f64,
    /// The least and the most.
    pub range: Option<(f64, f64)>,
    /// Drawn as a line across the bar.
    pub goal: Option<f64>,
}

const WIDTH: f64 = 720.0;
const NAMES: f64 = 130.0;
const VALUES: f64 = 70.0;
const HEAD: f64 = 34.0;
const LINE: f64 = 26.0;
const THICKNESS: f64 = 14.0;

/// Horizontal bars with their values, in units of `unit`.
pub fn bars(title: &str, unit: &str, bars: &[Bar]) -> String {
    let tallest = |bar: &Bar| {
        [Some(bar.value), bar.range.map(|(_, most)| most), bar.goal].into_iter().flatten().fold(0.0, f64::max)
    };
    let scale = (WIDTH - NAMES - VALUES) / bars.iter().map(tallest).fold(f64::MIN_POSITIVE, f64::max);
    let height = HEAD + LINE * bars.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#7a7f87\">\n<text x=\"0\" y=\"16\" font-size=\"14\">{title}</text>\n"
    );
    for (number, Bar { name, value, range, goal }) in bars.iter().enumerate() {
        let top = HEAD + LINE * number as f64;
        let middle = top + THICKNESS / 2.0;
        let x = |value: f64| NAMES + value * scale;
        // Writing to a String does not fail.
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{name}</text>", NAMES - 8.0, middle + 4.0);
        let _ = writeln!(
            svg,
            "<rect x=\"{NAMES}\" y=\"{top}\" width=\"{:.1}\" height=\"{THICKNESS}\" rx=\"2\" fill=\"#3b82c4\"/>",
            value * scale
        );
        if let Some((least, most)) = range {
            let _ = writeln!(
                svg,
                "<path d=\"M{:.1} {middle}H{:.1}\" stroke=\"#16324f\" stroke-width=\"2\"/>",
                x(*least),
                x(*most)
            );
        }
        if let Some(goal) = goal {
            let _ = writeln!(
                svg,
                "<path d=\"M{:.1} {}V{}\" stroke=\"#d97706\" stroke-width=\"2\"/>",
                x(*goal),
                top - 3.0,
                top + THICKNESS + 3.0
            );
        }
        let end = range.map_or(*value, |(_, most)| most.max(*value)).max(goal.unwrap_or(0.0));
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{}\">{value:.2}{unit}</text>", x(end) + 8.0, middle + 4.0);
    }
    svg.push_str("</svg>\n");
    svg
}
