//! A member of a consumer group that speaks Kafka's protocol by hand, and as the group's leader
//! assigns no partition to any member.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::waiting::eventually;

const JOIN_GROUP: (i16, i16) = (11, 2);
const SYNC_GROUP: (i16, i16) = (14, 1);
const HEARTBEAT: (i16, i16) = (12, 1);
const LEAVE_GROUP: (i16, i16) = (13, 1);
/// The broker loads the group, or another one coordinates it for a moment.
const NOT_READY: [i16; 3] = [14, 15, 16];
const REBALANCE_IN_PROGRESS: i16 = 27;
const SESSION_MS: i32 = 10_000;
/// A subscription (version 0) to no topic.
const SUBSCRIPTION: &[u8] = &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];

/// A connection to the coordinator of a group, and the membership.
pub struct GroupLeader {
    stream: TcpStream,
    group: String,
    member: String,
    generation: i32,
}

impl GroupLeader {
    /// Joins a group without members, so it is the leader. `group` has the prefix of the test, and
    /// the broker at `address` must be its coordinator.
    pub async fn join(address: &str, group: String) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut leader = Self { stream, group, member: String::new(), generation: 0 };
        let members = eventually("the broker is ready to coordinate the group", async || match leader.rejoin().await {
            Ok(members) => Some(members),
            Err(code) if NOT_READY.contains(&code) => None,
            Err(code) => panic!("cannot join the group: {code}"),
        })
        .await;
        assert_eq!(members, 1, "the group has other members");
        leader.assign_nothing().await;
        leader
    }

    /// Waits until a member joins or leaves, and takes part in that rebalance. Returns the number
    /// of members afterwards.
    pub async fn rebalance(&mut self) -> i32 {
        self.until_rebalance().await;
        let members = self.rejoin().await.unwrap();
        self.assign_nothing().await;
        members
    }

    /// Sends heartbeats until a member joins or leaves.
    pub async fn until_rebalance(&mut self) {
        eventually("a member joins or leaves the group", async || {
            let generation = self.generation.to_be_bytes();
            let body = [&string(&self.group)[..], &generation, &string(&self.member)].concat();
            match self.request(HEARTBEAT, &body).await.error() {
                0 => None,
                REBALANCE_IN_PROGRESS => Some(()),
                code => panic!("Kafka refuses a heartbeat: {code}"),
            }
        })
        .await;
    }

    pub async fn leave(mut self) {
        let body = [string(&self.group), string(&self.member)].concat();
        assert_eq!(self.request(LEAVE_GROUP, &body).await.error(), 0, "cannot leave the group");
    }

    /// Returns the number of members, or Kafka's error code.
    async fn rejoin(&mut self) -> Result<i32, i16> {
        let body = [
            &string(&self.group)[..],
            &SESSION_MS.to_be_bytes(),
            &SESSION_MS.to_be_bytes(), // time for a rebalance
            &string(&self.member),
            &string("consumer"),
            &1_i32.to_be_bytes(), // number of protocols
            &string("cooperative-sticky"),
            &bytes(SUBSCRIPTION),
        ]
        .concat();
        let mut answer = self.request(JOIN_GROUP, &body).await;
        match answer.error() {
            0 => {}
            code => return Err(code),
        }
        self.generation = answer.i32();
        answer.string(); // the protocol
        let leader = answer.string();
        self.member = answer.string();
        assert_eq!(leader, self.member, "another member leads the group");
        Ok(answer.i32())
    }

    /// A member that is missing in the leader's list gets an empty assignment.
    async fn assign_nothing(&mut self) {
        let generation = self.generation.to_be_bytes();
        let none = 0_i32.to_be_bytes();
        let body = [&string(&self.group)[..], &generation, &string(&self.member), &none].concat();
        assert_eq!(self.request(SYNC_GROUP, &body).await.error(), 0, "cannot assign partitions");
    }

    async fn request(&mut self, (api, version): (i16, i16), body: &[u8]) -> Answer {
        const CORRELATION: i32 = 1;
        let head = [&api.to_be_bytes()[..], &version.to_be_bytes(), &CORRELATION.to_be_bytes(), &string("")].concat();
        self.stream.write_all(&bytes(&[&head, body].concat())).await.unwrap();
        let length = self.stream.read_i32().await.unwrap();
        let mut answer = vec![0; usize::try_from(length).unwrap()];
        self.stream.read_exact(&mut answer).await.unwrap();
        Answer(answer.split_off(CORRELATION_AND_THROTTLE))
    }
}

/// Each answer begins with the correlation id and the throttle time, of four bytes each.
const CORRELATION_AND_THROTTLE: usize = 8;

/// The rest of an answer, read from its beginning.
struct Answer(Vec<u8>);

impl Answer {
    fn error(&mut self) -> i16 {
        self.i16()
    }

    fn i16(&mut self) -> i16 {
        i16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn i32(&mut self) -> i32 {
        i32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn string(&mut self) -> String {
        let length = self.i16();
        String::from_utf8(self.take(usize::try_from(length).unwrap())).unwrap()
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        self.0.drain(..count).collect()
    }
}

fn string(text: &str) -> Vec<u8> {
    [&i16::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat()
}

fn bytes(content: &[u8]) -> Vec<u8> {
    [&i32::try_from(content.len()).unwrap().to_be_bytes()[..], content].concat()
}
