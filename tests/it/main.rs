//! What a user relies on, through the program itself, on a tiny random model.

mod bad_input;
mod bad_places;
mod browser;
mod chat_server;
mod check;
mod embed;
mod endpoint;
mod export;
mod fan_out;
mod faults;
mod flows;
mod graphs;
mod judging;
mod kill;
mod learn;
mod metrics;
#[cfg(feature = "otel")]
mod otel;
mod pairs;
mod peft;
mod power;
mod process;
mod report;
mod resume;
mod reuse;
mod rounds;
mod sampling;
mod scorer;
mod service;
mod strangers;
mod support;
mod train;
mod watch;
mod whole;
