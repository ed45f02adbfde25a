//! Secured components: each service logs in as itself and may do on Kafka only what the topology
//! draws.

mod operators;
mod rights;
mod work;
