//! What an error of a Kafka client means.

use rdkafka::error::{KafkaError, RDKafkaErrorCode};

/// Who can end an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The client: a broker does not answer, a partition has no leader, or the group rebalances.
    /// The client retries.
    Transport,
    /// An operator: the broker answered and refused the request, for example because this service
    /// may not read the topic. The client repeats the request.
    Refused,
    /// The owner of the client, with a new client.
    Fatal,
}

pub(super) fn class(error: &KafkaError) -> Class {
    match error {
        KafkaError::MessageConsumptionFatal(_) => Class::Fatal,
        _ => error.rdkafka_error_code().map_or(Class::Transport, class_of),
    }
}

fn class_of(code: RDKafkaErrorCode) -> Class {
    use RDKafkaErrorCode as Code;
    match code {
        Code::Fatal | Code::Fenced => Class::Fatal,
        // Found by the client itself, but nothing that it could end.
        Code::Authentication
        | Code::SSL
        | Code::UnknownTopic
        | Code::UnknownPartition
        | Code::UnsupportedFeature
        | Code::LogTruncation => Class::Refused,
        // Answers of a broker that change by themselves.
        Code::LeaderNotAvailable
        | Code::NotLeaderForPartition
        | Code::RequestTimedOut
        | Code::BrokerNotAvailable
        | Code::ReplicaNotAvailable
        | Code::NetworkException
        | Code::CoordinatorLoadInProgress
        | Code::CoordinatorNotAvailable
        | Code::NotCoordinator
        | Code::IllegalGeneration
        | Code::UnknownMemberId
        | Code::RebalanceInProgress
        | Code::NotController
        | Code::ReassignmentInProgress
        | Code::FetchSessionIdNotFound
        | Code::InvalidFetchSessionEpoch
        | Code::FencedLeaderEpoch
        | Code::UnknownLeaderEpoch
        | Code::OffsetNotAvailable
        | Code::MemberIdRequired
        | Code::PreferredLeaderNotAvailable
        | Code::EligibleLeadersNotAvailable
        | Code::UnstableOffsetCommit
        | Code::ThrottlingQuotaExceeded
        | Code::UnknownTopicId
        | Code::FencedMemberEpoch
        | Code::StaleMemberEpoch
        | Code::RebootstrapRequired => Class::Transport,
        // The client's own codes are negative. Most say that something did not happen in time.
        code if (code as i32) < 0 => Class::Transport,
        _ => Class::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_operator_ends_a_refusal() {
        use RDKafkaErrorCode as Code;
        for refused in [
            Code::TopicAuthorizationFailed,
            Code::GroupAuthorizationFailed,
            Code::SaslAuthenticationFailed,
            Code::Authentication,
            Code::UnknownTopicOrPartition,
            Code::GroupMaxSizeReached,
            Code::PolicyViolation,
            Code::InvalidMessage,
        ] {
            assert_eq!(class(&KafkaError::MessageConsumption(refused)), Class::Refused, "{refused:?}");
        }
        for transport in [
            Code::BrokerTransportFailure,
            Code::AllBrokersDown,
            Code::OperationTimedOut,
            Code::NotLeaderForPartition,
            Code::RebalanceInProgress,
            Code::PollExceeded,
        ] {
            assert_eq!(class(&KafkaError::MessageConsumption(transport)), Class::Transport, "{transport:?}");
        }
        let fatal = KafkaError::MessageConsumptionFatal(Code::FencedInstanceId);
        assert_eq!(class(&fatal), Class::Fatal);
        assert_eq!(class(&KafkaError::Canceled), Class::Transport);
    }
}
