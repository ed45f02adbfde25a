//! The email service from outside: its deliveries' states in the order they were taken, and facts and states written by hand.

use std::time::Duration;

use sqlx::PgPool;
use testbed::smtp_sink::Mail;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::log::Draft;
use crate::{Part, System, eventually_eq};

/// What no question asked from time to time can see: every state that a delivery passes through.
pub const DIARY: &str = "
    create table if not exists delivery_diary (
        number bigint generated always as identity, delivery_id uuid not null, user_id uuid not null, status text not null
    );
    create or replace function keep_diary() returns trigger language plpgsql as $$ begin
        insert into delivery_diary (delivery_id, user_id, status) values (new.id, new.user_id, new.status);
        return null;
    end $$;
    create or replace trigger keep_diary after insert or update of status on deliveries for each row execute function keep_diary();";

impl System {
    /// A user service and an email service, ready, whose deliveries keep a diary from now on.
    pub async fn start_mailing(settings: &[(&str, &str)]) -> Self {
        let mut system = Self::empty().await;
        system.spawn(Part::User, &[]);
        system.spawn(Part::Email, &[]);
        system.ready(&[Part::User, Part::Email]).await;
        sqlx::raw_sql(DIARY).execute(&system.database(Part::Email).await).await.unwrap();
        // Started twice, because the diary comes after the migrations and before a fault can.
        if !settings.is_empty() {
            system.restart(Part::Email, settings).await;
        }
        system
    }

    /// The states of the user's deliveries so far, separated by blanks.
    pub async fn diary(&self, user: Uuid) -> String {
        diary(&self.database(Part::Email).await, user).await
    }

    /// Waits until the user's deliveries have passed through exactly these states.
    pub async fn until_diary(&self, user: Uuid, states: &str) {
        let db = self.database(Part::Email).await;
        eventually_eq("the delivery's states", states.to_owned(), async || diary(&db, user).await).await;
    }

    /// The mails that the sink has for an address.
    pub fn mails_to(&self, email: &str) -> Vec<Mail> {
        self.sink.mails().into_iter().filter(|mail| mail.to == [email]).collect()
    }

    /// A fact about `user`, written by hand, that happened this long ago.
    pub async fn write_fact(&self, kind: &str, user: Uuid, version: i64, age: Duration) {
        let time = (OffsetDateTime::now_utc() - age).format(&Rfc3339).unwrap();
        let fact = Draft::user_event(kind, user, version).without("ce_time").with("ce_time", time.as_bytes());
        self.write("user.events.v1", &fact).await;
    }

    /// A state of `user`, written by hand.
    pub async fn write_state(&self, user: Uuid, version: i64, email: &str) {
        let value = serde_json::json!({ "email": email, "display_name": "Ada Lovelace" });
        let state =
            Draft { value: Some(value.to_string().into_bytes()), ..Draft::envelope("user.state", user, version) };
        self.write("user.state.v1", &state).await;
    }

    /// Waits until a consumer group has committed everything that its topic holds.
    pub async fn until_read(&self, group: &str, topic: &str) {
        eventually_eq(&format!("{group} has read all"), vec![], async || self.lag_of(group, topic)).await;
    }
}

async fn diary(db: &PgPool, user: Uuid) -> String {
    let states =
        sqlx::query_scalar("select string_agg(status, ' ' order by number) from delivery_diary where user_id = $1");
    let states: Option<String> = states.bind(user).fetch_one(db).await.unwrap();
    states.unwrap_or_default()
}
