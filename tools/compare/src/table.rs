//! One table for each scenario, on the terminal and on the page.

use bench::Spread;
use testbed::say::say;

use crate::added::Added;
use crate::outcome::{Components, Outcome, Reads};
use crate::scenario::Scenario;
use crate::{results::Results, subject::Side};

/// A row: what it says, and the cell of each side.
pub type Row = (&'static str, Vec<String>);

pub fn print(results: &Results) {
    for scenario in &results.plan.scenarios {
        let (sides, rows) = table(results, *scenario);
        say(format_args!("\n{}", results.plan.title(*scenario)));
        let line = |first: &str, cells: Vec<String>| {
            let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:>22}")).collect();
            say(format_args!("  {first:<62}{}", cells.join("")));
        };
        line("", sides.iter().map(|side| side.name().to_owned()).collect());
        for (what, cells) in rows {
            line(what, cells);
        }
    }
    for Added {
        side,
        changed,
        restarted,
        wanted,
        refused,
        earlier,
        earlier_in_index,
        later,
        later_without_entry,
        history,
    } in &results.added
    {
        say(format_args!(
            "\nA fourth receiver for {}: {} new files with {} lines, {} edited files with {} lines, {restarted} processes \
             replaced, {refused} of {wanted} registrations never answered, {earlier_in_index} of {earlier} earlier users \
             and all but {later_without_entry} of {later} later ones in the index",
            side.name(),
            changed.new_files,
            changed.new_lines,
            changed.edited_files,
            changed.edited_lines,
        ));
        if let Some(history) = history {
            say(format_args!("It had all earlier users after {history:.1} s"));
        }
    }
    for violation in &results.violations {
        say(format_args!("{violation}"));
    }
    say(format_args!("\nInvariants of Waybill that the faults violated: {}", results.violations.len()));
}

/// The sides that a scenario was run with, and its rows. Rows without any value are left out.
pub fn table(results: &Results, scenario: Scenario) -> (Vec<Side>, Vec<Row>) {
    let outcomes: Vec<&Outcome> = results.plan.sides.iter().filter_map(|side| results.of(scenario, *side)).collect();
    let rows =
        ROWS.iter().map(|(what, cell)| (*what, outcomes.iter().map(|outcome| cell(outcome)).collect::<Vec<_>>()));
    let rows = rows.filter(|(_, cells)| cells.iter().any(|cell| !cell.is_empty()));
    (outcomes.iter().map(|outcome| outcome.side).collect(), rows.collect())
}

type Cell = fn(&Outcome) -> String;

const ROWS: [(&str, Cell); 27] = [
    ("registrations requested", |o| o.wanted.to_string()),
    ("answered 201", |o| o.answered.to_string()),
    ("answered, of those requested during the fault or burst", |o| {
        in_fault(o, &format!("{} of {}", o.answered_in_fault, o.wanted_in_fault))
    }),
    ("registrations whose answer named a missing effect", |o| o.told_missing.to_string()),
    ("answer time: p50 / p99 / max, ms", |o| spread(o.answer)),
    ("answer time during the fault or burst, ms", |o| in_fault(o, &spread(o.answer_in_fault))),
    ("users that exist", |o| o.users.to_string()),
    ("users without mail at the end", |o| o.without_mail.to_string()),
    ("second copies of mails", |o| o.doubled_mails.to_string()),
    ("users not counted at the end", |o| o.without_count.to_string()),
    ("users without profile at the end", |o| o.without_profile.to_string()),
    ("users lacking an effect, client repeats", |o| o.incomplete_of_repeating.to_string()),
    ("users lacking an effect, client gives up", |o| o.incomplete_of_giving_up.to_string()),
    ("all effects exist, s after the fault or load ends", |o| {
        o.recovered.map_or("never".to_owned(), |seconds| format!("{seconds:.1}"))
    }),
    ("calls, batches and mails retried", |o| format!("{:.0}", o.retried)),
    ("from answer to mail (mails sent): p50 / p99 / max, ms", |o| spread(o.mail_window)),
    ("from answer to count (users counted): p50 / p99 / max, ms", |o| spread(o.count_window)),
    ("from answer to profile (profiles found): p50 / p99 / max, ms", |o| spread(o.profile_window)),
    ("profile found by the first read", |o| found(o.reads.found_at_once, o.reads)),
    ("profile found within 5 s", |o| found(o.reads.found, o.reads)),
    ("profile found by the first read with min_version", |o| {
        found(o.reads_with_version.found_at_once, o.reads_with_version)
    }),
    ("profile found within 5 s with min_version", |o| found(o.reads_with_version.found, o.reads_with_version)),
    ("CPU per registration, services, ms", |o| o.cost.map(|cost| format!("{:.2}", cost.services)).unwrap_or_default()),
    ("CPU per registration, Postgres / Kafka / Redis, ms", |o| {
        let components = o.cost.and_then(|cost| cost.components);
        let kafka = |c: Components| {
            if o.side == Side::Waybill { format!("{:.2}", c.kafka) } else { "not used".to_owned() }
        };
        let text = |c: Components| format!("{:.2} / {} / {:.2}", c.postgres, kafka(c), c.redis);
        components.map(text).unwrap_or_default()
    }),
    ("CPU per registration, total, ms", |o| {
        o.cost.map(|cost| format!("{:.2}", cost.total(o.side))).unwrap_or_default()
    }),
    ("service processes; their memory, MB", |o| {
        o.cost.map(|cost| format!("{}, {:.0}", cost.processes, cost.memory)).unwrap_or_default()
    }),
    ("memory of Kafka, MB", |o| {
        let components = o.cost.and_then(|cost| cost.components).filter(|_| o.side == Side::Waybill);
        components.map(|components| format!("{:.0}", components.kafka_memory)).unwrap_or_default()
    }),
];

fn in_fault(outcome: &Outcome, text: &str) -> String {
    if outcome.wanted_in_fault == 0 { String::new() } else { text.to_owned() }
}

fn spread(spread: Spread) -> String {
    format!("{:.0} / {:.0} / {:.0}", spread.median, spread.p99, spread.most)
}

fn found(found: usize, reads: Reads) -> String {
    if reads.all == 0 { String::new() } else { format!("{found} of {}", reads.all) }
}
