//! A record written byte by byte, for content that no client library sends. The formats are in
//! Kafka's protocol guide: `Produce` version 3 and record batches of magic 2.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Asks the broker at this address to append a record with an empty value, whether it leads the
/// partition or not. `topic` has the prefix of the test. The error is Kafka's error code.
pub async fn append_at(address: String, topic: String, partition: i32, key: &[u8]) -> Result<i64, i16> {
    append(&address, &topic, partition, key, b"", &[]).await
}

/// Appends a record and waits for the answer: the offset, or Kafka's error code.
pub async fn append(
    address: &str,
    topic: &str,
    partition: i32,
    key: &[u8],
    value: &[u8],
    headers: &[(&[u8], &[u8])],
) -> Result<i64, i16> {
    let request = produce(topic, partition, &batch(&record(key, value, headers)));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&i32::try_from(request.len()).unwrap().to_be_bytes()).await.unwrap();
    stream.write_all(&request).await.unwrap();
    let length = stream.read_i32().await.unwrap();
    let mut answer = vec![0; usize::try_from(length).unwrap()];
    stream.read_exact(&mut answer).await.unwrap();
    // The answer ends with error code (2 bytes), offset (8), append time (8) and throttle time (4).
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
        &0_i16.to_be_bytes()[..], // attributes: no compression, no transaction
        &0_i32.to_be_bytes(),     // offset of the last record
        &TIME_MS.to_be_bytes(),   // time of the first record
        &TIME_MS.to_be_bytes(),   // time of the latest record
        &(-1_i64).to_be_bytes(),  // no producer id
        &(-1_i16).to_be_bytes(),  // no producer epoch
        &(-1_i32).to_be_bytes(),  // no sequence number
        &1_i32.to_be_bytes(),     // number of records
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
    varint(&mut body, 0); // time, relative to the batch
    varint(&mut body, 0); // offset, relative to the batch
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

/// Zigzag encoding doubles a number that is not negative.
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
