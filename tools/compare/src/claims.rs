//! What docs/compared.md says as a relation. The list is printed on the page and checked twice: by
//! a test, in a short comparison, and by every run that writes the page.

use crate::outcome::Outcome;
use crate::results::Results;
use crate::scenario::Scenario;
use crate::subject::Side;

pub struct Claim {
    pub text: &'static str,
    /// `None`: the run has no outcome that could tell.
    pub holds: fn(&Results) -> Option<bool>,
}

const WAYBILL: &[Side] = &[Side::Waybill];
const SYNCHRONOUS: &[Side] = &Side::SYNCHRONOUS;
const WITHIN_THE_REQUEST: &[Side] = &Side::WITHIN_THE_REQUEST;
const BACKGROUND: &[Side] = &[Side::Background];
const BOTH: &[Side] = &Side::ALL;

pub fn claims() -> &'static [Claim] {
    &CLAIMS
}

const CLAIMS: [Claim; 20] = [
    Claim {
        text: "Without a fault and at 30 % of the slowest side's capacity, both sides answer every registration. Every \
               effect exists, and no mail is sent twice.",
        holds: |r| every(r, Scenario::Light, BOTH, |o| o.refused() == 0 && o.incomplete() == 0 && o.doubled_mails == 0),
    },
    Claim {
        text: "Without a fault, the mail is sent, the user is counted and the profile is readable when the synchronous \
               version answers.",
        holds: |r| {
            every(r, Scenario::Light, SYNCHRONOUS, |o| {
                o.mail_window.most == 0.0 && o.count_window.most == 0.0 && o.reads.found_at_once == o.reads.all
            })
        },
    },
    Claim {
        text: "Without a fault, Waybill sends at least half of the mails after its answer.",
        holds: |r| every(r, Scenario::Light, WAYBILL, |o| o.mail_window.median > 0.0),
    },
    Claim {
        text: "Without a fault, a reader that sends `min_version` gets the profile within 5 s, on both sides.",
        holds: |r| every(r, Scenario::Light, BOTH, |o| o.reads_with_version.found == o.reads_with_version.all),
    },
    Claim {
        text: "If the mail server takes 500 ms longer, at least half of the synchronous answers take 500 ms or more.",
        holds: |r| every(r, Scenario::SlowMail, SYNCHRONOUS, |o| o.answer_in_fault.median >= 500.0),
    },
    Claim {
        text: "If the mail server takes 500 ms longer, half of Waybill's answers still come within 500 ms.",
        holds: |r| every(r, Scenario::SlowMail, WAYBILL, |o| o.answer_in_fault.median < 500.0),
    },
    Claim {
        text: "While the mail server is down, both sides answer every registration.",
        holds: |r| every(r, Scenario::MailDown, BOTH, |o| o.answered_in_fault == o.wanted_in_fault),
    },
    Claim {
        text: "While the mail server is down, the variants that only call within the request lose mails. Their answers say so.",
        holds: |r| {
            let loses = |o: &Outcome| o.without_mail > 0 && o.told_missing >= o.without_mail;
            every(r, Scenario::MailDown, WITHIN_THE_REQUEST, loses)
        },
    },
    Claim {
        text: "The variant `background` loses no mail and no count: the outage is shorter than its minute of retries.",
        holds: |r| {
            let mails = every(r, Scenario::MailDown, BACKGROUND, |o| o.without_mail == 0)?;
            Some(mails && every(r, Scenario::AnalyticsDown, BACKGROUND, |o| o.without_count == 0)?)
        },
    },
    Claim {
        text: "Waybill loses no mail while the mail server is down.",
        holds: |r| every(r, Scenario::MailDown, WAYBILL, |o| o.without_mail == 0),
    },
    Claim {
        text: "While the database of analytics is down, the variants that only call within the request lose counts.",
        holds: |r| every(r, Scenario::AnalyticsDown, WITHIN_THE_REQUEST, |o| o.without_count > 0),
    },
    Claim {
        text: "Waybill loses no count while the database of analytics is down, and answers every registration.",
        holds: |r| {
            every(r, Scenario::AnalyticsDown, WAYBILL, |o| {
                o.incomplete() == 0 && o.answered_in_fault == o.wanted_in_fault
            })
        },
    },
    Claim {
        text: "No profile is lost on either side while the store of the cache is down.",
        holds: |r| every(r, Scenario::StoreDown, BOTH, |o| o.without_profile == 0),
    },
    Claim {
        text: "While the store of the cache is down, the synchronous version reads the profile from `user`, and every \
               reader gets it. Some readers of Waybill do not get the profile within 5 s.",
        holds: |r| {
            let calls = every(r, Scenario::StoreDown, SYNCHRONOUS, |o| o.reads.found == o.reads.all)?;
            Some(calls && every(r, Scenario::StoreDown, WAYBILL, |o| o.reads.found < o.reads.all)?)
        },
    },
    Claim {
        text: "While Kafka does not answer, Waybill answers every registration, but some readers do not get the profile \
               within 5 s. Afterwards every effect exists, and no mail is sent twice.",
        holds: |r| {
            every(r, Scenario::KafkaDown, WAYBILL, |o| {
                let is_complete = o.incomplete() == 0 && o.doubled_mails == 0;
                is_complete && o.answered_in_fault == o.wanted_in_fault && o.reads.found < o.reads.all
            })
        },
    },
    Claim {
        text: "In a burst of 150 % of what the slowest side can take, the synchronous version answers at least as many \
               registrations as Waybill.",
        holds: |r| {
            let waybill = r.of(Scenario::Burst, Side::Waybill)?.answered_in_fault;
            every(r, Scenario::Burst, SYNCHRONOUS, |o| o.answered_in_fault >= waybill)
        },
    },
    Claim {
        text: "If the registering process of the synchronous version is killed, users of clients that give up lack effects.",
        holds: |r| every(r, Scenario::Killed, SYNCHRONOUS, |o| o.incomplete_of_giving_up > 0),
    },
    Claim {
        text: "If the registering process of Waybill is killed, every user that exists gets every effect, and no mail is \
               sent twice. This does not hold for a kill of the process that sends mails.",
        holds: |r| every(r, Scenario::Killed, WAYBILL, |o| o.incomplete() == 0 && o.doubled_mails == 0),
    },
    Claim {
        text: "A fourth receiver that is added while the system runs reads the whole history from Waybill's topic. With calls it \
               has none until somebody writes a backfill.",
        holds: |r| {
            let all = r.added.iter().all(|added| match added.side {
                Side::Waybill => added.earlier_in_index == added.earlier && added.refused == 0,
                _ => added.earlier_in_index == 0,
            });
            (!r.added.is_empty()).then_some(all)
        },
    },
    Claim {
        text: "After all faults, the checker that ends every fault test finds no violated invariant of Waybill.",
        holds: |r| r.of(Scenario::Killed, Side::Waybill).map(|_| r.violations.is_empty()),
    },
];

/// Whether all of these sides that the run has measured in the scenario are so.
fn every(results: &Results, scenario: Scenario, sides: &[Side], so: impl Fn(&Outcome) -> bool) -> Option<bool> {
    let mut outcomes = sides.iter().filter_map(|side| results.of(scenario, *side)).peekable();
    outcomes.peek()?;
    Some(outcomes.all(so))
}
