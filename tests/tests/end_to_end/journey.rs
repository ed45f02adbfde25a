//! One registration, from the request to every effect, and its erasure from everywhere.

use tests::{Part, System, api, eventually, eventually_eq};

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_reaches_everybody_and_its_erasure_too() {
    let system = System::start().await;
    let email = api::address();
    let id = system.register_as(&email).await;
    system.until_mailed(id).await;
    let mail = eventually("the mail is in the sink", async || system.sink.mails().pop()).await;
    assert_eq!(mail.to, std::slice::from_ref(&email));
    eventually_eq("the registration and its mail are counted", (1, 1), async || system.funnel().await).await;
    let profile = system.until_cached(id, 1).await;
    assert_eq!(profile.body["email"], email);

    assert_eq!(system.rename(id, "Countess").await.unwrap().version(), 2);
    assert_eq!(system.until_cached(id, 2).await.body["display_name"], "Countess");

    assert_eq!(system.erase(id).await.unwrap().status, 204);
    eventually_eq("the cache has forgotten", 404, async || system.profile(id, Some(3)).await.unwrap().status.as_u16())
        .await;
    system.until_drained().await;
    assert!(system.metric(Part::Cache, "events_consumed_total", &["outcome=\"applied\""]).await.unwrap() >= 3.0);
}
