//! A record written byte by byte, for what no Kafka client lets through. Formats: Kafka's protocol guide, `Produce` version 3 and
//! record batches of magic 2.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::System;

impl System {
    /// Appends one record, on a system with one broker, and waits for Kafka's answer: partition and offset.
    pub async fn write_by_hand(
        &self,
        topic: &str,
        partition: i32,
        key: &[u8],
        value: &[u8],
        headers: &[(&[u8], &[u8])],
    ) -> (i32, i64) {
        let batch = batch(&record(key, value, headers));
        let offset = append(&self.kafka, &self.prefixed(topic), partition, &batch).await;
        (partition, offset.unwrap_or_else(|code| panic!("Kafka refuses the record: error {code}")))
    }
}

/// Asks this very broker to append a record, whoever leads the partition, and waits for its answer: the offset, or Kafka's code of
/// the error. `topic` has its prefix.
pub async fn write_to(address: String, topic: String, partition: i32, key: &[u8]) -> Result<i64, i16> {
    append(&address, &topic, partition, &batch(&record(key, b"", &[]))).await
}

async fn append(address: &str, topic: &str, partition: i32, batch: &[u8]) -> Result<i64, i16> {
    let request = produce(topic, partition, batch);
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&i32::try_from(request.len()).unwrap().to_be_bytes()).await.unwrap();
    stream.write_all(&request).await.unwrap();
    let length = stream.read_i32().await.unwrap();
    let mut answer = vec![0; usize::try_from(length).unwrap()];
    stream.read_exact(&mut answer).await.unwrap();
    // At its end: error code, offset, time, and how long the broker throttled us.
    let end = &answer[answer.len() - 22..];
    match i16::from_be_bytes([end[0], end[1]]) {
        0 => Ok(i64::from_be_bytes(end[2..10].try_into().unwrap())),
        code => Err(code),
    }
}

fn produce(topic: &str, partition: i32, batch: &[u8]) -> Vec<u8> {
    const API: i16 = 0;
    const VERSION: i16 = 3;
    const CORRELATION: i32 = 1;
    const NONE: i16 = -1;
    const ALL_REPLICAS: i16 = -1;
    const TIMEOUT_MS: i32 = 10_000;
    const ONE: i32 = 1;
    [
        &API.to_be_bytes()[..],
        &VERSION.to_be_bytes(),
        &CORRELATION.to_be_bytes(),
        &NONE.to_be_bytes(), // client id
        &NONE.to_be_bytes(), // transactional id
        &ALL_REPLICAS.to_be_bytes(),
        &TIMEOUT_MS.to_be_bytes(),
        &ONE.to_be_bytes(), // topics
        &i16::try_from(topic.len()).unwrap().to_be_bytes(),
        topic.as_bytes(),
        &ONE.to_be_bytes(), // partitions
        &partition.to_be_bytes(),
        &i32::try_from(batch.len()).unwrap().to_be_bytes(),
        batch,
    ]
    .concat()
}

fn batch(record: &[u8]) -> Vec<u8> {
    const TIME_MS: i64 = 1_763_812_800_000;
    let checked = [
        &0_i16.to_be_bytes()[..], // no compression, no transaction
        &0_i32.to_be_bytes(),     // the last record's offset
        &TIME_MS.to_be_bytes(),   // of the first record
        &TIME_MS.to_be_bytes(),   // of the latest
        &(-1_i64).to_be_bytes(),  // no producer id
        &(-1_i16).to_be_bytes(),  // nor its epoch
        &(-1_i32).to_be_bytes(),  // nor a sequence
        &1_i32.to_be_bytes(),     // records
        record,
    ]
    .concat();
    let length = i32::try_from(4 + 1 + 4 + checked.len()).unwrap();
    [
        &0_i64.to_be_bytes()[..], // base offset
        &length.to_be_bytes(),
        &(-1_i32).to_be_bytes(), // leader epoch
        &[2],                    // magic
        &crc32c(&checked).to_be_bytes(),
        &checked,
    ]
    .concat()
}

fn record(key: &[u8], value: &[u8], headers: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut body = vec![0]; // attributes
    varint(&mut body, 0); // time, from the batch's
    varint(&mut body, 0); // offset, from the batch's
    sized(&mut body, key);
    sized(&mut body, value);
    varint(&mut body, headers.len());
    for (name, value) in headers {
        sized(&mut body, name);
        sized(&mut body, value);
    }
    let mut record = vec![];
    sized(&mut record, &body);
    record
}

fn sized(out: &mut Vec<u8>, bytes: &[u8]) {
    varint(out, bytes.len());
    out.extend(bytes);
}

/// Zigzag: a number that is not negative is doubled.
fn varint(out: &mut Vec<u8>, number: usize) {
    let mut rest = number * 2;
    while rest >= 0x80 {
        out.push((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// CRC-32C (Castagnoli), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0_u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}
