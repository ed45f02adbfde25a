//! Five questions about the registrations of the Laboratory, and their answers.

use std::collections::BTreeMap;

use serde::Serialize;

use super::fates::{Effect, Fate, Received};
use super::registrations::Registration;
use super::totals::Compared;

#[derive(Clone, Debug)]
pub struct Indicator {
    pub name: &'static str,
    /// What it means, in one sentence.
    pub meaning: &'static str,
    pub verdict: Verdict,
    /// The figures, and the reason.
    pub text: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Verdict {
    /// There is no registration yet.
    #[default]
    Unknown,
    Holds,
    CatchingUp,
    Violated,
}

impl Verdict {
    pub fn text(self) -> &'static str {
        match self {
            Self::Unknown => "nothing to judge yet",
            Self::Holds => "holds",
            Self::CatchingUp => "catching up",
            Self::Violated => "violated",
        }
    }
}

const NAMES: [(&str, &str); 5] = [
    (
        "Accepted means published",
        "Each accepted registration is in user.events.v1 and in user.state.v1: the console has seen both records, or \
         their consumers have handled them.",
    ),
    (
        "Mailed at least once",
        "The mail server has accepted a mail for each registration, and at most one copy per attempt of the email \
         service. A second copy follows only a lost answer or an expired lease.",
    ),
    (
        "Counted once",
        "The analytics service has recorded each registration exactly once. The total of its funnel has grown by the \
         number of users that arrived in the topic in the same time, from any client.",
    ),
    (
        "Readable in the cache",
        "The cache has each user, with the newest version that a command returned, or a later one.",
    ),
    (
        "Nothing lost silently",
        "Each accepted registration has all its effects, or waits in a place that you can see: an outbox, a lag, a mail \
         that the email service reports, or a dead letter.",
    ),
];

/// The answers. `all` are the registrations that are watched.
pub fn indicators<'a>(
    all: impl Iterator<Item = &'a Registration> + Clone,
    mails: Option<&BTreeMap<String, Received>>,
    compared: &Compared,
) -> Vec<Indicator> {
    let mut found: Vec<(Verdict, String)> = Effect::ALL.map(|effect| of_effect(all.clone(), effect)).into();
    found[Effect::Mail as usize].1 += &copies(all.clone(), mails);
    let counted = &mut found[Effect::Count as usize];
    counted.1 += &total(compared);
    if matches!(compared, Compared::Differs { .. }) {
        counted.0 = Verdict::Violated;
    }
    found.push(of_all(all));
    let with_names = NAMES.into_iter().zip(found);
    with_names.map(|((name, meaning), (verdict, text))| Indicator { name, meaning, verdict, text }).collect()
}

fn of_effect<'a>(all: impl Iterator<Item = &'a Registration>, effect: Effect) -> (Verdict, String) {
    let mut tally = Tally::default();
    all.for_each(|registration| tally.add(&[registration.fate(effect)]));
    (tally.verdict(), tally.text())
}

/// A violation only if an effect is missing: too many effects lose nothing.
fn of_all<'a>(all: impl Iterator<Item = &'a Registration>) -> (Verdict, String) {
    let mut tally = Tally::default();
    for registration in all {
        let fates = Effect::ALL.map(|effect| registration.fate(effect));
        let fates: Vec<&Fate> = fates.into_iter().filter(|fate| !matches!(fate, Fate::TooMuch(_))).collect();
        tally.add(&fates);
    }
    (tally.verdict(), tally.text())
}

/// How many registrations are complete, wait and are wrong, with the most frequent reasons.
#[derive(Default)]
struct Tally<'a> {
    all: usize,
    done: usize,
    waits: BTreeMap<&'a str, usize>,
    wrong: BTreeMap<&'a str, usize>,
}

impl<'a> Tally<'a> {
    /// Counts a registration by the worst of these fates.
    fn add(&mut self, fates: &[&'a Fate]) {
        self.all += 1;
        let wrong = fates.iter().find_map(|fate| fate.violation());
        let waits = fates.iter().find_map(|fate| match fate {
            Fate::Waits(text) => Some(text.as_str()),
            _ => None,
        });
        match (wrong, waits) {
            (Some(text), _) => *self.wrong.entry(text).or_default() += 1,
            (None, Some(text)) => *self.waits.entry(text).or_default() += 1,
            (None, None) => self.done += 1,
        }
    }

    fn verdict(&self) -> Verdict {
        match self {
            Self { all: 0, .. } => Verdict::Unknown,
            Self { wrong, .. } if !wrong.is_empty() => Verdict::Violated,
            Self { waits, .. } if !waits.is_empty() => Verdict::CatchingUp,
            _ => Verdict::Holds,
        }
    }

    fn text(&self) -> String {
        if self.all == 0 {
            return "Register some users.".to_owned();
        }
        let reasons = |label: &str, reasons: &BTreeMap<&str, usize>| {
            let most = reasons.iter().max_by_key(|(_, count)| **count);
            let count: usize = reasons.values().sum();
            most.map_or(String::new(), |(reason, _)| format!(" {count} {label}: {reason}."))
        };
        format!("{} of {}.{}{}", self.done, self.all, reasons("wrong", &self.wrong), reasons("wait", &self.waits))
    }
}

fn copies<'a>(all: impl Iterator<Item = &'a Registration>, mails: Option<&BTreeMap<String, Received>>) -> String {
    let Some(mails) = mails else { return " The mail server cannot be asked for copies.".to_owned() };
    let received = all.filter_map(|registration| mails.get(&registration.registered.email));
    let (mut copies, mut lost) = (0, 0);
    for Received { mails, unanswered } in received {
        let further = mails.saturating_sub(1);
        copies += further;
        lost += further.min(*unanswered);
    }
    match (copies, copies - lost) {
        (0, _) => String::new(),
        (_, 0) => format!(" {copies} copies: {lost} after a lost answer."),
        (_, others) => format!(" {copies} copies: {lost} after a lost answer, {others} after an ended lease."),
    }
}

fn total(compared: &Compared) -> String {
    match compared {
        Compared::NotYet => " The total is not compared yet.".to_owned(),
        Compared::Same(0) => String::new(),
        Compared::Same(users) => format!(" The total and the topic have {users} new users."),
        Compared::Differs { in_topic, counted } => {
            format!(" The total has {counted} new users, but the topic has {in_topic}.")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laboratory::fates::{Checked, Delivery, Situation};
    use crate::laboratory::registrations::Registrations;

    fn verdicts(found: &Checked, situation: &Situation, compared: &Compared) -> Vec<Verdict> {
        let mut registrations = Registrations::default();
        let user = uuid::Uuid::from_u128(1);
        registrations.accept(user, "lab@test".to_owned(), 1);
        let later = Situation { taken: situation.taken + std::time::Duration::from_secs(60), ..situation.clone() };
        (0..3).for_each(|_| registrations.judge(user, found, &later));
        let found = indicators(registrations.all(), situation.mails.as_ref(), compared);
        found.into_iter().map(|indicator| indicator.verdict).collect()
    }

    #[test]
    fn each_indicator_is_violated_by_its_own_fault() {
        use Verdict::{CatchingUp, Holds, Violated};
        let sent = |attempts| Some(vec![Delivery { status: "sent".to_owned(), attempts }]);
        let right = Checked { counted: Some(1), cached: Some(Some(1)), deliveries: sent(1), letter: None };
        let mails = |mails| Situation {
            mails: Some([("lab@test".to_owned(), Received { mails, unanswered: 0 })].into()),
            ..Situation::quiet()
        };
        let same = Compared::Same(1);
        assert_eq!(verdicts(&right, &mails(1), &same), [Holds; 5]);
        let lost = Checked { cached: Some(None), ..right.clone() };
        assert_eq!(
            verdicts(&lost, &mails(1), &same),
            [Violated, Holds, Holds, Violated, Violated],
            "not published either"
        );
        let twice = Checked { counted: Some(2), ..right.clone() };
        assert_eq!(verdicts(&twice, &mails(1), &same), [Holds, Holds, Violated, Holds, Holds]);
        assert_eq!(
            verdicts(&right, &mails(2), &same),
            [Holds, Violated, Holds, Holds, Holds],
            "a copy without an attempt"
        );
        assert_eq!(verdicts(&right, &mails(0), &same), [Holds, Violated, Holds, Holds, Violated]);
        let differs = Compared::Differs { in_topic: 1, counted: 2 };
        assert_eq!(verdicts(&right, &mails(1), &differs), [Holds, Holds, Violated, Holds, Holds]);
        let silent = Checked { deliveries: None, ..right };
        assert_eq!(verdicts(&silent, &mails(0), &same), [Holds, CatchingUp, Holds, Holds, CatchingUp]);
    }

    #[test]
    fn without_registrations_nothing_is_judged() {
        let found = indicators([].iter(), None, &Compared::NotYet);
        assert!(found.iter().all(|indicator| indicator.verdict == Verdict::Unknown));
    }
}
