//! Events of the user service: facts, which carry no personal data, and the current state, which
//! can be erased.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{DecodeError, Event, Topic, from_json, to_json};

/// What happened to a user. Facts are kept permanently, so they never carry personal data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserEvent {
    Registered(UserRef),
    ProfileChanged(UserRef),
    EmailChanged(UserRef),
    Deleted(UserRef),
}

/// The user that a fact is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRef {
    pub user_id: Uuid,
}

impl Event for UserEvent {
    const TOPIC: Topic = Topic::USER_EVENTS;

    fn encode(&self) -> (&'static str, Option<Vec<u8>>) {
        let (kind, user) = match self {
            Self::Registered(user) => ("user.registered", user),
            Self::ProfileChanged(user) => ("user.profile_changed", user),
            Self::EmailChanged(user) => ("user.email_changed", user),
            Self::Deleted(user) => ("user.deleted", user),
        };
        (kind, Some(to_json(user)))
    }

    fn decode(kind: &str, data: Option<&[u8]>) -> Result<Option<Self>, DecodeError> {
        let variant = match kind {
            "user.registered" => Self::Registered,
            "user.profile_changed" => Self::ProfileChanged,
            "user.email_changed" => Self::EmailChanged,
            "user.deleted" => Self::Deleted,
            _ => return Ok(None),
        };
        Ok(Some(variant(from_json(data)?)))
    }

    fn user(&self, _key: Uuid) -> Uuid {
        let (Self::Registered(user) | Self::ProfileChanged(user) | Self::EmailChanged(user) | Self::Deleted(user)) =
            self;
        user.user_id
    }

    #[cfg(feature = "test-support")]
    fn samples(user: Uuid) -> Vec<Self> {
        let variants = [Self::Registered, Self::ProfileChanged, Self::EmailChanged, Self::Deleted];
        variants.map(|variant| variant(UserRef { user_id: user })).into()
    }
}

/// The current state of a user. The record's key is the user's id and its version is the user's
/// version.
#[derive(Clone, PartialEq, Eq)]
pub enum UserState {
    Current(Profile),
    /// The tombstone: every reader deletes the profile.
    Erased,
}

/// The personal data. It does not implement `Debug`, so it cannot be printed to a log line.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    pub email: String,
    pub display_name: String,
    /// The principal that registered the user: only it and administrators may read the profile. A
    /// keyed hash, as the actor of an event. `None`: registered without a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Uuid>,
}

impl Event for UserState {
    const TOPIC: Topic = Topic::USER_STATE;

    fn encode(&self) -> (&'static str, Option<Vec<u8>>) {
        match self {
            Self::Current(profile) => ("user.state", Some(to_json(profile))),
            Self::Erased => ("user.state", None),
        }
    }

    fn decode(kind: &str, data: Option<&[u8]>) -> Result<Option<Self>, DecodeError> {
        match (kind, data) {
            ("user.state", None) => Ok(Some(Self::Erased)),
            ("user.state", data) => Ok(Some(Self::Current(from_json(data)?))),
            _ => Ok(None),
        }
    }

    fn user(&self, key: Uuid) -> Uuid {
        key
    }

    #[cfg(feature = "test-support")]
    fn samples(_user: Uuid) -> Vec<Self> {
        let profile = Profile {
            email: "ada@example.com".to_owned(),
            display_name: "Ada Lovelace".to_owned(),
            owner: Some(super::mint_id()),
        };
        vec![Self::Current(profile), Self::Erased]
    }
}
