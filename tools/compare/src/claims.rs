//! What docs/compared.md says as a relation. The list is printed on the page and checked twice: by a
//! test, in a short comparison, and by every run that writes the page.

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
const BOTH: &[Side] = &Side::ALL;

pub fn claims() -> &'static [Claim] {
    &CLAIMS
}

const CLAIMS: [Claim; 16] = [
    Claim {
        text: "Without a fault, both sides answer every registration, and every effect exists once.",
        holds: |r| every(r, Scenario::Light, BOTH, |o| o.refused() == 0 && o.incomplete() == 0 && o.doubled_mails == 0),
    },
    Claim {
        text: "When the synchronous version answers, the mail is sent, the user is counted and the profile is readable.",
        holds: |r| {
            every(r, Scenario::Light, SYNCHRONOUS, |o| {
                o.mail_window.most == 0.0 && o.count_window.most == 0.0 && o.reads.found_at_once == o.reads.all
            })
        },
    },
    Claim {
        text: "When Waybill answers, the mail is not sent yet. It follows.",
        holds: |r| every(r, Scenario::Light, WAYBILL, |o| o.mail_window.median > 0.0),
    },
    Claim {
        text: "A reader that sends `min_version` gets the profile, on both sides.",
        holds: |r| every(r, Scenario::Light, BOTH, |o| o.reads_with_version.found == o.reads_with_version.all),
    },
    Claim {
        text: "If the mail server takes 500 ms longer, so does every answer of the synchronous version.",
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
        text: "The synchronous version loses mails while the mail server is down, and its answers say which.",
        holds: |r| {
            every(r, Scenario::MailDown, SYNCHRONOUS, |o| o.without_mail > 0 && o.told_missing >= o.without_mail)
        },
    },
    Claim {
        text: "Waybill loses no mail while the mail server is down.",
        holds: |r| every(r, Scenario::MailDown, WAYBILL, |o| o.without_mail == 0),
    },
    Claim {
        text: "The synchronous version loses counts while the database of analytics is down.",
        holds: |r| every(r, Scenario::AnalyticsDown, SYNCHRONOUS, |o| o.without_count > 0),
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
        text: "If the registering process of the synchronous version is killed, users of clients that give up lack effects.",
        holds: |r| every(r, Scenario::Killed, SYNCHRONOUS, |o| o.incomplete_of_giving_up > 0),
    },
    Claim {
        text: "If the registering process of Waybill is killed, every user that exists gets every effect, and one mail.",
        holds: |r| every(r, Scenario::Killed, WAYBILL, |o| o.incomplete() == 0 && o.doubled_mails == 0),
    },
    Claim {
        text: "A fourth receiver that is added while the system runs has the whole history with Waybill, and none of it with calls.",
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
