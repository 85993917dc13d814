//! The metrics of a run as Prometheus reads them.

use std::sync::Arc;

use metrics::{KeyName, Recorder, Unit};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use super::Metrics;
use super::catalogue::{Kind, METRICS};

/// A recorder of one run's metrics and the handle that renders them; every sample carries the
/// label `flow`.
pub fn recorder(flow: &str) -> Result<(Metrics, PrometheusHandle), BuildError> {
    let mut builder = PrometheusBuilder::new().add_global_label("flow", flow);
    for metric in METRICS {
        if let Kind::Histogram(buckets) = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.into()), buckets)?;
        }
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    for metric in METRICS {
        let (key, help) = (KeyName::from_const_str(metric.name), metric.help.into());
        match metric.kind {
            Kind::Counter => recorder.describe_counter(key, None, help),
            Kind::Gauge => recorder.describe_gauge(key, None, help),
            Kind::Histogram(_) => recorder.describe_histogram(key, None::<Unit>, help),
        }
    }
    Ok((Metrics::new(Arc::new(recorder)), handle))
}

/// The metrics as Prometheus reads them. Seconds that add up are gauges of the façade and counters here.
pub fn render(handle: &PrometheusHandle) -> String {
    let mut text = handle.render();
    for metric in METRICS.iter().filter(|m| matches!(m.kind, Kind::Gauge) && m.kind_name() == "counter") {
        text = text.replace(&format!("# TYPE {} gauge", metric.name), &format!("# TYPE {} counter", metric.name));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_rendered_with_its_kind_and_help() {
        let (metrics, handle) = recorder("loop").unwrap();
        metrics.counter("flowrun_stage_rows_in_total", &[("stage", "judge")]).increment(3);
        metrics.gauge("flowrun_train_seconds_total", &[("stage", "align")]).increment(0.5);
        metrics.histogram("flowrun_llm_step_seconds", &[("device", "cpu:0")]).record(0.02);
        let text = render(&handle);
        assert!(text.contains("flowrun_stage_rows_in_total{flow=\"loop\",stage=\"judge\"} 3"), "{text}");
        assert!(text.contains("# TYPE flowrun_llm_step_seconds histogram"), "{text}");
        assert!(text.contains("# HELP flowrun_llm_step_seconds"), "{text}");
        assert!(text.contains("# TYPE flowrun_train_seconds_total counter"), "{text}");
    }
}
