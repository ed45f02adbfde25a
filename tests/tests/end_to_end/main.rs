//! The end-to-end tests: the real services on real Kafka, Postgres, Valkey and SMTP.
//! `cargo xtask test` starts these components and runs the tests.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "a panic is how a test fails")]

mod admin_port;
mod alerts;
mod analytics_queries;
mod analytics_rebuild;
mod audit;
mod bad_requests;
mod breaker;
mod broker_failures;
mod cache_store;
mod cache_view;
mod cache_waiters;
mod commands;
mod consumer_crashes;
mod consumer_waits;
mod databases;
mod dead_letters;
mod deleted_records;
mod effects;
mod email;
mod failing_records;
mod http_limits;
mod journey;
mod local_stack;
mod malformed_records;
mod metrics;
mod metrics_page;
mod migrations;
mod network_faults;
mod operators;
mod outages;
mod outbox;
mod outcome_counters;
mod poolers;
mod rate_limits;
mod readme;
mod rebalancing;
mod registration;
mod relay_blocks;
mod relay_crashes;
mod relay_leadership;
mod republishing;
mod secured_collector;
mod secured_kafka;
mod secured_postgres;
mod secured_system;
mod secured_valkey;
mod sessions;
mod settings;
mod startup;
mod tokens;
mod topics;
mod tracing;
mod wrong_clocks;
