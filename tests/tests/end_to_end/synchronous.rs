//! The synchronous version of the comparison: it works, and it fails as its documentation says.

use testbed::smtp_sink::{Fault, Stage};
use tests::http::{send, send_with_retries};
use tests::synchronous::{Role, Synchronous, Variant, missing};
use tests::users::address;
use tests::{eventually, eventually_eq};
use uuid::Uuid;

const MAIL_DOWN: Fault = Fault::Reject { stage: Stage::Mail, code: 421 };

fn key() -> String {
    Uuid::now_v7().to_string()
}

async fn has_profile(synchronous: &Synchronous, id: Uuid) -> bool {
    synchronous.profile(id).await.is_ok_and(|answer| answer.status.is_success() && answer.version() == 1)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_synchronous_registration_has_all_effects_when_it_is_answered() {
    for variant in Variant::WITHIN_THE_REQUEST {
        let synchronous = Synchronous::start(variant).await;
        let email = address();
        let key = key();
        let (id, missed) = synchronous.register(&email, &key).await;
        assert!(missed.is_empty(), "{variant:?}: {missed:?}");
        assert_eq!(synchronous.mail.to(&email).len(), 1, "{variant:?}");
        assert_eq!(synchronous.counted().await, 1, "{variant:?}");
        assert!(has_profile(&synchronous, id).await, "{variant:?}");
        // A repeated request gets the same answer and has no further effect.
        assert_eq!(synchronous.register(&email, &key).await, (id, vec![]), "{variant:?}");
        assert_eq!(synchronous.mail.to(&email).len(), 1, "{variant:?}");
        assert_eq!(synchronous.counted().await, 1, "{variant:?}");
        let taken = send(synchronous.registration(&email, None)).await.unwrap();
        assert_eq!(taken.status.as_u16(), 409, "{taken:?}");
        let reused = send(synchronous.registration(&address(), Some(&key))).await.unwrap();
        assert_eq!(reused.status.as_u16(), 422, "{reused:?}");
    }
}

/// Each receiver is down once. The caller is told, the others get their call, and a repeated
/// request makes the missing call and no other.
#[tokio::test(flavor = "multi_thread")]
async fn a_synchronous_registration_names_the_receiver_that_is_down() {
    for variant in Variant::WITHIN_THE_REQUEST {
        let mut synchronous = Synchronous::start(variant).await;
        let [first, second, third] = [address(), address(), address()];
        let [first_key, second_key, third_key] = [key(), key(), key()];

        synchronous.mail.fail(MAIL_DOWN);
        assert_eq!(synchronous.register(&first, &first_key).await.1, ["mail"], "{variant:?}");
        synchronous.mail.recover();
        assert!(synchronous.mail.to(&first).is_empty(), "{variant:?}");
        assert_eq!(synchronous.counted().await, 1, "{variant:?}");

        synchronous.kill(Role::Analytics);
        assert_eq!(synchronous.register(&second, &second_key).await.1, ["analytics"], "{variant:?}");
        synchronous.start_role(Role::Analytics).await;
        assert_eq!(synchronous.counted().await, 1, "{variant:?}");

        synchronous.kill(Role::Cache);
        let (cached, missed) = synchronous.register(&third, &third_key).await;
        assert_eq!(missed, ["cache"], "{variant:?}");
        synchronous.start_role(Role::Cache).await;
        assert!(has_profile(&synchronous, cached).await, "{variant:?}: the cache asks the role `user`");

        for (email, key) in [(&first, &first_key), (&second, &second_key), (&third, &third_key)] {
            assert!(synchronous.register(email, key).await.1.is_empty(), "{variant:?}");
            assert_eq!(synchronous.mail.to(email).len(), 1, "{variant:?}");
        }
        assert_eq!(synchronous.counted().await, 3, "{variant:?}");
    }
}

/// The user is committed before the calls, so a process that dies in between leaves a user without
/// effects. A caller that repeats the request repairs it, after the time that the first request may
/// take.
#[tokio::test(flavor = "multi_thread")]
async fn a_synchronous_registration_that_is_killed_between_commit_and_calls_lacks_its_effects() {
    let mut synchronous = Synchronous::start(Variant::Sequential).await;
    let email = address();
    let key = key();
    synchronous.mail.fail(Fault::Slow { ms: 1_000, stage: Stage::Rcpt });
    let unanswered = tokio::spawn(send(synchronous.registration(&email, Some(&key))));
    eventually_eq("users", 1, async || synchronous.registered().await).await;
    synchronous.kill(Role::User);
    assert!(unanswered.await.unwrap().is_err(), "killed before it answered");
    synchronous.mail.recover();
    synchronous.start_role(Role::User).await;
    assert_eq!(synchronous.registered().await, 1);
    assert_eq!(synchronous.counted().await, 0);
    assert!(synchronous.mail.to(&email).is_empty());
    let early = send(synchronous.registration(&email, Some(&key))).await.unwrap();
    assert_eq!(early.status.as_u16(), 409, "the killed request might still be making calls: {early:?}");
    let answer = send_with_retries(|| synchronous.registration(&email, Some(&key))).await;
    assert!(missing(&answer).is_empty(), "{answer:?}");
    assert_eq!(synchronous.mail.to(&email).len(), 1);
    assert_eq!(synchronous.counted().await, 1);
}

/// The call is repeated by the program while the request waits. When a receiver fails for longer,
/// the breaker refuses calls at once, and permits them again when the receiver works.
#[tokio::test(flavor = "multi_thread")]
async fn a_resilient_call_is_retried_and_a_breaker_ends_the_retries() {
    let synchronous = Synchronous::start(Variant::Resilient).await;
    let email = address();
    synchronous.mail.fail(MAIL_DOWN.times(2));
    assert!(synchronous.register(&email, &key()).await.1.is_empty(), "the second retry succeeds");
    assert_eq!(synchronous.mail.to(&email).len(), 1);
    assert!(synchronous.calls("Retried").await >= 1.0);
    synchronous.mail.fail(MAIL_DOWN);
    eventually("the breaker refuses a call", async || {
        assert_eq!(synchronous.register(&address(), &key()).await.1, ["mail"]);
        (synchronous.calls("Refused").await > 0.0).then_some(())
    })
    .await;
    synchronous.mail.recover();
    eventually("the breaker permits calls again", async || {
        synchronous.register(&address(), &key()).await.1.is_empty().then_some(())
    })
    .await;
}

/// The variant `background` makes missing calls again after the answer. It sends one mail, even if
/// the caller repeats the request at the same time. A killed process loses the missing calls.
#[tokio::test(flavor = "multi_thread")]
async fn a_synchronous_registration_in_the_background_forgets_what_it_misses_when_it_is_killed() {
    let mut synchronous = Synchronous::start(Variant::Background).await;
    let [kept, forgotten] = [address(), address()];
    let repeated = key();
    synchronous.mail.fail(MAIL_DOWN);
    assert_eq!(synchronous.register(&kept, &repeated).await.1, ["mail"]);
    synchronous.mail.recover();
    eventually("the mail is sent after the answer", async || (!synchronous.mail.to(&kept).is_empty()).then_some(()))
        .await;
    eventually_eq("missing effects of the repeated request", Vec::<String>::new(), async || {
        let answer = send(synchronous.registration(&kept, Some(&repeated))).await.unwrap();
        if answer.status.is_success() { missing(&answer) } else { vec![answer.status.to_string()] }
    })
    .await;
    assert_eq!(synchronous.mail.to(&kept).len(), 1);

    synchronous.mail.fail(MAIL_DOWN);
    assert_eq!(synchronous.register(&forgotten, &key()).await.1, ["mail"]);
    synchronous.kill(Role::User);
    synchronous.mail.recover();
    synchronous.start_role(Role::User).await;
    assert_eq!(synchronous.register(&address(), &key()).await.1, Vec::<String>::new(), "it works again");
    assert!(synchronous.mail.to(&forgotten).is_empty());
}
