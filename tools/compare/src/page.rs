//! docs/compared.md and its charts, from the results of a full run.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bench::{Bar, bars};
use testbed::paths::root;

use crate::added::Added;
use crate::claims::claims;
use crate::lines::{self, Changed};
use crate::outcome::Outcome;
use crate::results::Results;
use crate::scenario::Scenario;
use crate::subject::Side;
use crate::table::table;

/// Everything that does not depend on the results.
const METHOD: &str = include_str!("method.md");

/// Columns of the paragraphs that are made from results.
const WIDTH: usize = 120;

/// A chart: its file, its title, the scenario, the unit, and the value of each side.
type Chart = (&'static str, &'static str, Scenario, &'static str, fn(&Outcome) -> f64);

const CHARTS: [Chart; 4] = [
    (
        "incomplete-mail.svg",
        "Users without mail after the mail server was down for 30 s",
        Scenario::MailDown,
        "",
        |outcome| outcome.without_mail as f64,
    ),
    (
        "slow-mail.svg",
        "Median of the answer while the mail server takes 500 ms longer",
        Scenario::SlowMail,
        " ms",
        |outcome| outcome.answer_in_fault.median,
    ),
    (
        "killed.svg",
        "Users that lack an effect after the registering process was killed ten times",
        Scenario::Killed,
        "",
        |outcome| outcome.incomplete() as f64,
    ),
    (
        "cpu.svg",
        "CPU per registration with databases and Kafka, at 80 % of the slowest side's capacity",
        Scenario::Heavy,
        " ms",
        |outcome| outcome.cost.map_or(0.0, |cost| cost.total(outcome.side)),
    ),
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
        writeln!(claimed, "{}", wrapped(&format!("- {}", claim.text), "  "))?;
    }
    let page = METHOD.replace("<!-- answer -->\n", &answer(results)?);
    let page = page.replace("<!-- claims -->\n", &claimed);
    Ok(page.replace("<!-- results -->\n", &measured(results)?))
}

/// The answer in five sentences, and when to start synchronously.
fn answer(results: &Results) -> Result<String> {
    let mut text = String::new();
    for sentence in [what_calls_do_better, what_events_keep, what_callers_wait_for, balance] {
        writeln!(text, "{}", wrapped(&format!("- {}", sentence(results)?), "  "))?;
    }
    let start = "- **Start with** calls, time-outs and an `Idempotency-Key`, and add an outbox, one topic and one consumer for the \
                 first effect that must not be lost.";
    writeln!(text, "{}\n", wrapped(start, "  "))?;
    let killed = of(results, Scenario::Killed, Side::Background)?;
    let paragraph = format!(
        "**Start synchronous if** one team owns every receiver, the caller needs the effects in the answer, and a lost effect \
         costs less than to operate Kafka (here one broker with {:.0} MB; one that survives the loss of a machine needs three). \
         Then retry in the background too. This still loses effects: with the registering process killed {} times, {} of {} \
         users lack an effect. The process was killed after its commit and before its calls ended, and the client did not \
         repeat the request.",
        kafka_memory(results)?,
        results.plan.kills,
        killed.incomplete(),
        killed.users,
    );
    writeln!(text, "{}", wrapped(&paragraph, ""))?;
    Ok(text)
}

/// Breaks the lines of a paragraph at blanks, as the other documents do. Lines after the first
/// begin with `indent`.
fn wrapped(text: &str, indent: &str) -> String {
    let mut wrapped = String::new();
    let mut column = 0;
    for word in text.split(' ') {
        if column > 0 && column + 1 + word.len() > WIDTH {
            wrapped.push('\n');
            wrapped.push_str(indent);
            column = indent.len();
        } else if column > 0 {
            wrapped.push(' ');
            column += 1;
        }
        wrapped.push_str(word);
        column += word.len();
    }
    wrapped
}

fn what_calls_do_better(results: &Results) -> Result<String> {
    let [waybill, synchronous] = results.lines;
    let events = of(results, Scenario::Light, Side::Waybill)?;
    let calls = of(results, Scenario::Light, Side::Resilient)?;
    let cpu = |outcome: &Outcome| outcome.cost.map_or(0.0, |cost| cost.total(outcome.side));
    Ok(format!(
        "**Calls are simpler and complete at once:** the synchronous version has {synchronous} lines of code and fewer \
         features. Waybill has {waybill} lines, and {} more in its messaging library. A registration, with databases and \
         Kafka, costs {:.1} ms of CPU with calls and {:.1} ms with Waybill at 30 % of the slowest side's capacity, and \
         {:.1} ms and {:.1} ms at 80 %. Without a fault every effect exists when the synchronous version answers. At \
         30 %, Waybill sends the mail {:.0} ms after its answer (p99 {:.0} ms).",
        lines::of_messaging(),
        cpu(calls),
        cpu(events),
        cpu(of(results, Scenario::Heavy, Side::Resilient)?),
        cpu(of(results, Scenario::Heavy, Side::Waybill)?),
        events.mail_window.median,
        events.mail_window.p99,
    ))
}

fn what_events_keep(results: &Results) -> Result<String> {
    let calls = of(results, Scenario::MailDown, Side::Resilient)?;
    let background = of(results, Scenario::MailDown, Side::Background)?;
    let events = of(results, Scenario::MailDown, Side::Waybill)?;
    let killed = of(results, Scenario::Killed, Side::Background)?;
    let killed_events = of(results, Scenario::Killed, Side::Waybill)?;
    Ok(format!(
        "**Events keep effects that a killed process loses:** after {} s without a mail server, {} of {} users never get \
         their mail if the program only retries within the request. With retries in the background for a minute, {} of {} \
         do not, and with Waybill {} of {}. After {} kills of the registering process, {} of {} users of the program with \
         background retries lack an effect, and {} of {} with Waybill. Of these users of the synchronous version, {} \
         belong to clients that repeat the request with the same key.",
        results.plan.fault.as_secs(),
        calls.without_mail,
        calls.users,
        background.without_mail,
        background.users,
        events.without_mail,
        events.users,
        results.plan.kills,
        killed.incomplete(),
        killed.users,
        killed_events.incomplete(),
        killed_events.users,
        killed.incomplete_of_repeating,
    ))
}

fn what_callers_wait_for(results: &Results) -> Result<String> {
    Ok(format!(
        "**With events no caller waits for a slow receiver:** while the mail server takes 500 ms longer, the median answer \
         time of the synchronous version is {:.0} ms, and that of Waybill {:.0} ms. All synchronous variants call before \
         they answer. Without a fault, at 80 % of the slowest side's capacity, the medians are {:.0} ms and {:.0} ms.",
        of(results, Scenario::SlowMail, Side::Resilient)?.answer_in_fault.median,
        of(results, Scenario::SlowMail, Side::Waybill)?.answer_in_fault.median,
        of(results, Scenario::Heavy, Side::Resilient)?.answer.median,
        of(results, Scenario::Heavy, Side::Waybill)?.answer.median,
    ))
}

fn balance(results: &Results) -> Result<String> {
    let calls = of(results, Scenario::Burst, Side::Resilient)?;
    let events = of(results, Scenario::Burst, Side::Waybill)?;
    let by_calls = changed(results, Side::Resilient)?;
    let by_events = changed(results, Side::Waybill)?;
    Ok(format!(
        "**Events become the better choice** with the first effect that must survive a killed process. They also do, which is \
         not measured here, with the first receiver of another team. A fourth receiver takes {} lines with calls, of which \
         {} are edits of existing files, and {} lines with events, of which {} are edits. Calls need less code, but the \
         registering program must be changed and restarted, and the receiver gets no earlier users. High load is no reason \
         for events: in a burst of {} registrations, more than either side can take, the synchronous version answers {} \
         (p50 {:.0} ms, p99 {:.0} ms), and Waybill {} (p50 {:.0} ms, p99 {:.0} ms).",
        by_calls.new_lines + by_calls.edited_lines,
        by_calls.edited_lines,
        by_events.new_lines + by_events.edited_lines,
        by_events.edited_lines,
        calls.wanted_in_fault,
        calls.answered_in_fault,
        calls.answer_in_fault.median,
        calls.answer_in_fault.p99,
        events.answered_in_fault,
        events.answer_in_fault.median,
        events.answer_in_fault.p99,
    ))
}

/// What the fourth receiver changes.
fn changed(results: &Results, side: Side) -> Result<Changed> {
    let added = results.added.iter().find(|added| added.side == side);
    Ok(added.context("the fourth receiver was added")?.changed)
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
    writeln!(text, "| side | registrations per second, until each is mailed and counted |\n|---|---:|")?;
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
    writeln!(
        text,
        "\nWaybill also uses the messaging in `shared`: {} lines. Both use the rest of it.",
        lines::of_messaging()
    )?;
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
        ("running processes that have to be replaced", |a| a.restarted.to_string()),
        ("registrations never answered", |a| format!("{} of {}", a.refused, a.wanted)),
        ("earlier users in the index", |a| format!("{} of {}", a.earlier_in_index, a.earlier)),
        ("later users without an entry", |a| format!("{} of {}", a.later_without_entry, a.later)),
        ("s until the index had all earlier users", |a| {
            a.history.map_or("never".to_owned(), |seconds| format!("{seconds:.1}"))
        }),
    ];
    for (what, cell) in rows {
        let cells: Vec<String> = results.added.iter().map(cell).collect();
        writeln!(text, "| {what} | {} |", cells.join(" | "))?;
    }
    let paragraph = "Waybill's edited file is the topology. Each side also needs deployment files; for Waybill, [a \
         service](extending.md#a-service) lists them. The synchronous version runs one registering process. With two of them \
         behind a load balancer, no registration would fail. The later users without an entry were registered by the old \
         process before it was replaced. The new receiver has no backfill. A program that reads all users and calls the \
         receiver would add the earlier users and these later ones.";
    writeln!(text, "\n{}", wrapped(paragraph, ""))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_after_the_first_are_indented() {
        let word = "a".repeat(70);
        assert_eq!(wrapped(&format!("- {word} {word} b"), "  "), format!("- {word}\n  {word} b"));
    }
}
