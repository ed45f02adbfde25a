//! docs/compared.md and its charts, from the results of a full run.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bench::{Bar, bars};
use testbed::paths::root;

use crate::added::Added;
use crate::claims::claims;
use crate::outcome::Outcome;
use crate::scenario::Scenario;
use crate::subject::Side;
use crate::table::table;
use crate::{lines, results::Results};

/// Everything that does not depend on the results.
const METHOD: &str = include_str!("method.md");

/// Columns of the paragraphs that are made from results.
const WIDTH: usize = 120;

/// A chart: its file, its title, the scenario, the unit, and the value of each side.
type Chart = (&'static str, &'static str, Scenario, &'static str, fn(&Outcome) -> f64);

const CHARTS: [Chart; 4] = [
    ("incomplete-mail.svg", "Users without mail after the mail server was down", Scenario::MailDown, "", |outcome| {
        outcome.without_mail as f64
    }),
    (
        "slow-mail.svg",
        "Median of the answer while the mail server takes 500 ms longer",
        Scenario::SlowMail,
        " ms",
        |outcome| outcome.answer_in_fault.median,
    ),
    ("killed.svg", "Users that lack an effect after the process was killed", Scenario::Killed, "", |outcome| {
        outcome.incomplete() as f64
    }),
    ("cpu.svg", "CPU per registration of all services, at 80 % of the load", Scenario::Heavy, " ms", |outcome| {
        outcome.cost.map_or(0.0, |cost| cost.services)
    }),
];

/// Writes the page and returns its path.
pub fn write(results: &Results) -> Result<PathBuf> {
    let docs = root().join("docs");
    let charts = docs.join("compared");
    fs::create_dir_all(&charts)?;
    let page = docs.join("compared.md");
    save(&page, &text(results)?)?;
    for (file, title, scenario, unit, value) in CHARTS {
        let measured = results.plan.sides.iter().filter_map(|side| results.of(scenario, *side));
        let bar = |outcome: &Outcome| Bar {
            name: outcome.side.name().to_owned(),
            value: value(outcome),
            range: None,
            goal: None,
        };
        save(&charts.join(file), &bars(title, unit, &measured.map(bar).collect::<Vec<_>>()))?;
    }
    Ok(page)
}

fn save(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn text(results: &Results) -> Result<String> {
    let mut claimed = String::new();
    for claim in claims() {
        writeln!(claimed, "- {}", claim.text)?;
    }
    let page = METHOD.replace("<!-- answer -->\n", &answer(results)?);
    let page = page.replace("<!-- claims -->\n", &claimed);
    Ok(page.replace("<!-- results -->\n", &measured(results)?))
}

/// The answer in five sentences, and when to start synchronously.
fn answer(results: &Results) -> Result<String> {
    let mut text = String::new();
    for sentence in [what_calls_do_better, what_events_keep, what_callers_feel, balance] {
        write!(text, "{} ", sentence(results)?)?;
    }
    writeln!(
        text,
        "A team should start with calls, time-outs and an `Idempotency-Key`, and add an outbox, one topic and one consumer for \
         the first effect that must not be lost.\n"
    )?;
    writeln!(
        text,
        "**Start synchronous if** one team owns every receiver, and the caller needs the effects in the answer, and a lost \
         effect costs less than to operate Kafka ({:.0} MB here), and the callers repeat a request whose answer names a \
         missing effect. If only the last is false, the table of the killed process shows what is lost: {} of {} users.",
        kafka_memory(results)?,
        of(results, Scenario::Killed, Side::Resilient)?.incomplete(),
        of(results, Scenario::Killed, Side::Resilient)?.users,
    )?;
    Ok(wrapped(&text))
}

/// Breaks the lines of paragraphs at blanks, as the other documents do.
fn wrapped(text: &str) -> String {
    let mut wrapped = String::new();
    let mut column = 0;
    for word in text.split(' ') {
        let length = word.split('\n').next().unwrap_or_default().len();
        if column > 0 && column + 1 + length > WIDTH {
            wrapped.push('\n');
            column = 0;
        } else if column > 0 {
            wrapped.push(' ');
            column += 1;
        }
        wrapped.push_str(word);
        column = word.rsplit_once('\n').map_or(column + word.len(), |(_, last)| last.len());
    }
    wrapped
}

fn what_calls_do_better(results: &Results) -> Result<String> {
    let [waybill, synchronous] = results.lines;
    let events = of(results, Scenario::Light, Side::Waybill)?;
    let calls = of(results, Scenario::Light, Side::Resilient)?;
    let cpu = |outcome: &Outcome| outcome.cost.map_or(0.0, |cost| cost.services);
    Ok(format!(
        "The synchronous version has {synchronous} lines against {waybill}, needs no Kafka ({:.0} MB), takes {:.2} ms of CPU per \
         registration against {:.2} ms, and every effect exists when it answers; Waybill's mail follows after {:.0} ms (p99 \
         {:.0} ms).",
        kafka_memory(results)?,
        cpu(calls),
        cpu(events),
        events.mail_window.median,
        events.mail_window.p99,
    ))
}

fn what_events_keep(results: &Results) -> Result<String> {
    let calls = of(results, Scenario::MailDown, Side::Resilient)?;
    let events = of(results, Scenario::MailDown, Side::Waybill)?;
    Ok(format!(
        "Events keep what calls lose: the mail server was down for {} s, and {} of {} users never got their mail from the \
         synchronous version with time-outs, retries and a breaker, and {} of {} from Waybill, which had sent all of them \
         {:.0} s after the server was back.",
        results.plan.fault.as_secs(),
        calls.without_mail,
        calls.users,
        events.without_mail,
        events.users,
        events.recovered.context("Waybill recovers")?,
    ))
}

fn what_callers_feel(results: &Results) -> Result<String> {
    Ok(format!(
        "A mail server that takes 500 ms longer makes the median answer of the synchronous version {:.0} ms, and that of \
         Waybill {:.0} ms.",
        of(results, Scenario::SlowMail, Side::Resilient)?.answer_in_fault.median,
        of(results, Scenario::SlowMail, Side::Waybill)?.answer_in_fault.median,
    ))
}

fn balance(results: &Results) -> Result<String> {
    let calls = of(results, Scenario::Heavy, Side::Resilient)?;
    let events = of(results, Scenario::Heavy, Side::Waybill)?;
    let slowest = results.capacity.iter().map(|(_, rate)| *rate).fold(f64::INFINITY, f64::min);
    Ok(format!(
        "The balance turns with the first effect that must not be lost, and with the first receiver of another team, because \
         each receiver is a call in the program that registers users ({} lines of it for the fourth receiver, none for \
         events); no load was found that turns it: at {:.0} registrations per second the synchronous version answers {} of \
         {} (p50 {:.0} ms, p99 {:.0} ms) and Waybill {} of {} (p50 {:.0} ms, p99 {:.0} ms).",
        edited_by_calls(results)?,
        0.8 * slowest,
        calls.answered,
        calls.wanted,
        calls.answer.median,
        calls.answer.p99,
        events.answered,
        events.wanted,
        events.answer.median,
        events.answer.p99,
    ))
}

/// Lines that the fourth receiver adds to the program that registers users synchronously.
fn edited_by_calls(results: &Results) -> Result<usize> {
    let added = results.added.iter().find(|added| added.side == Side::Resilient);
    Ok(added.context("the fourth receiver was added")?.changed.edited_lines)
}

fn kafka_memory(results: &Results) -> Result<f64> {
    let cost = of(results, Scenario::Light, Side::Waybill)?.cost;
    Ok(cost.and_then(|cost| cost.components).context("the components are measured")?.kafka_memory)
}

fn of(results: &Results, scenario: Scenario, side: Side) -> Result<&Outcome> {
    results.of(scenario, side).context("a full run has every scenario and side")
}

fn measured(results: &Results) -> Result<String> {
    let mut text = String::new();
    let machine = &results.machine;
    writeln!(text, "On {} cores ({}), load {:.2} before the run.\n", machine.cores, machine.processor, machine.load)?;
    writeln!(text, "| side | registrations per second with all their effects |\n|---|---:|")?;
    for (side, rate) in &results.capacity {
        writeln!(text, "| {} | {rate:.0} |", side.name())?;
    }
    for (file, title, ..) in CHARTS {
        writeln!(text, "\n![{title}](compared/{file})")?;
    }
    for scenario in &results.plan.scenarios {
        let (sides, rows) = table(results, *scenario);
        writeln!(text, "\n### {}\n", results.plan.title(*scenario))?;
        let names: Vec<&str> = sides.iter().map(|side| side.name()).collect();
        writeln!(text, "| | {} |\n|---|{}", names.join(" | "), "---:|".repeat(names.len()))?;
        for (what, cells) in rows {
            writeln!(text, "| {what} | {} |", cells.join(" | "))?;
        }
    }
    added(&mut text, results)?;
    writeln!(text, "\n### Lines of code\n")?;
    writeln!(text, "| Waybill's services | the synchronous version |\n|---:|---:|")?;
    writeln!(text, "| {} | {} |", results.lines[0], results.lines[1])?;
    writeln!(text, "\nOf `shared`, which both sides use, the messaging is {} lines.", lines::of_messaging())?;
    Ok(text)
}

/// What a row says, and the cell of each side.
type AddedRow = (&'static str, fn(&Added) -> String);

fn added(text: &mut String, results: &Results) -> Result<()> {
    writeln!(text, "\n### A fourth receiver is added while the system runs\n")?;
    let names: Vec<&str> = results.added.iter().map(|added| added.side.name()).collect();
    writeln!(text, "| | {} |\n|---|{}", names.join(" | "), "---:|".repeat(names.len()))?;
    let rows: [AddedRow; 7] = [
        ("new files, their lines", |a| format!("{}, {}", a.changed.new_files, a.changed.new_lines)),
        ("edited files, their new lines", |a| format!("{}, {}", a.changed.edited_files, a.changed.edited_lines)),
        ("running processes that were replaced", |a| a.restarted.to_string()),
        ("registrations never answered", |a| format!("{} of {}", a.refused, a.wanted)),
        ("earlier users in the index", |a| format!("{} of {}", a.earlier_in_index, a.earlier)),
        ("later users without an entry", |a| format!("{} of {}", a.later_without_entry, a.later)),
        ("s until the index had all that it gets", |a| format!("{:.1}", a.took)),
    ];
    for (what, cell) in rows {
        let cells: Vec<String> = results.added.iter().map(cell).collect();
        writeln!(text, "| {what} | {} |", cells.join(" | "))?;
    }
    writeln!(
        text,
        "\nOf Waybill the edited file is the topology. Each side also needs its deployment: for Waybill, [a \
         service](extending.md#a-service) lists the files. The registering process of the synchronous version is one process; \
         with two of them behind a load balancer no registration would fail."
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_wrapped_and_stay_paragraphs() {
        let word = "a".repeat(70);
        assert_eq!(wrapped(&format!("{word} {word}\n\nb c")), format!("{word}\n{word}\n\nb c"));
    }
}
