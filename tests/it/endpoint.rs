//! Models at an endpoint: a chat server here, with every fault that one can have.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use axum::http::header;
use flowrun::flow::ModelSpec;
use flowrun::llm::endpoint::{ChatReply, ChatRequest, Endpoint};
use flowrun::llm::{LlmError, Sampling, Stream};
use flowrun::model::chat::ChatMessage;
use flowrun::observe::prometheus;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::chat_server::{Said, Server};
use crate::support::{Case, stderr, tiny_model};

/// Nobody listens here.
async fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}/v1", listener.local_addr().unwrap())
}

fn endpoint(addresses: &[&str], keys: &str) -> Endpoint {
    let (metrics, _) = prometheus::recorder("test").unwrap();
    let spec: ModelSpec = toml::from_str(&format!("endpoint = {addresses:?}\nname = 'big'\n{keys}")).unwrap();
    Endpoint::new("gpt", spec.endpoint.unwrap(), spec.system_prompt.as_deref(), metrics).unwrap()
}

fn streams(count: u32) -> Vec<Stream> {
    (0..count).map(|index| Stream { key: 1, row: 2, index }).collect()
}

async fn ask(endpoint: &Endpoint, count: u32) -> Result<ChatReply, LlmError> {
    let sampling = Sampling { temperature: 0.7, ..Sampling::greedy(32) };
    let messages = [ChatMessage::new("user", "hello")];
    let streams = streams(count);
    endpoint
        .answers(ChatRequest { messages: &messages, tools: None, streams: &streams, sampling: &sampling, stop: &[] })
        .await
}

fn texts(reply: &ChatReply) -> Vec<&str> {
    reply.answers.iter().map(|a| a.text.as_str()).collect()
}

/// The message of an error of the kind that `kind` matches.
fn told(reply: Result<ChatReply, LlmError>, kind: fn(&LlmError) -> bool) -> String {
    let error = reply.expect_err("must fail");
    assert!(kind(&error), "{error:?}");
    error.to_string()
}

fn is_user(error: &LlmError) -> bool {
    matches!(error, LlmError::Model(_))
}

fn is_row(error: &LlmError) -> bool {
    matches!(error, LlmError::Refused(_))
}

fn is_passing(error: &LlmError) -> bool {
    matches!(error, LlmError::Unreachable(_))
}

#[tokio::test]
async fn what_is_asked_and_what_comes_back() {
    let server = Server::start(|_, request| {
        let texts: Vec<&str> =
            ["Grüß dich", "你好，世界 👋", "שלום"].into_iter().take(request["n"].as_u64().unwrap() as usize).collect();
        Said::texts(&texts)
    })
    .await;
    let endpoint = endpoint(&[&server.address], "api_key = 'hunter2'\nsystem_prompt = 'Be brief.'");
    let sampling = Sampling { temperature: 0.5, top_p: 0.9, presence_penalty: 0.1, ..Sampling::greedy(32) };
    let messages = [ChatMessage::new("user", "¿qué?")];
    let (streams, stop) = (streams(3), ["\n\n".to_owned()]);
    let ask = ChatRequest { messages: &messages, tools: None, streams: &streams, sampling: &sampling, stop: &stop };
    let reply = endpoint.answers(ask).await.unwrap();
    assert_eq!(texts(&reply), ["Grüß dich", "你好，世界 👋", "שלום"]);
    assert_eq!((reply.prompt_tokens, reply.generation_tokens, reply.answers[0].tokens), (Some(11), Some(9), None));
    let seed = streams[0].seed();
    assert!(seed >= 0);
    let expected = json!([{
        "model": "big",
        "messages": [{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "¿qué?" }],
        "max_tokens": 32, "temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.1, "stop": ["\n\n"], "n": 3,
        "seed": seed, "authorization": "Bearer hunter2",
    }]);
    assert_eq!(Value::from(server.asked()), expected);
    let own = [ChatMessage::new("system", "Be long."), ChatMessage::new("user", "a")];
    endpoint.answers(ChatRequest { messages: &own, ..ask }).await.unwrap();
    assert_eq!(server.asked()[1]["messages"][0]["content"], "Be long.");
    assert_eq!(server.asked()[1]["messages"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_server_that_gives_one_answer_at_a_time_is_asked_for_the_others() {
    let server = Server::start(|number, _| Said::text(&format!("answer {number}"))).await;
    let reply = ask(&endpoint(&[&server.address], ""), 3).await.unwrap();
    assert_eq!(texts(&reply), ["answer 0", "answer 1", "answer 2"]);
    assert_eq!((reply.answers[2].tokens, reply.generation_tokens), (Some(3), Some(9)));
    let asked = server.asked();
    assert_eq!(asked.iter().map(|a| a["n"].as_u64()).collect::<Vec<_>>(), [Some(3), Some(2), None]);
    assert!(asked[0]["seed"] != asked[1]["seed"] && asked[1]["seed"] != asked[2]["seed"]);
    assert!(asked[0]["authorization"].is_null());
}

#[tokio::test]
async fn what_passes_is_asked_again() {
    let server = Server::start(|number, _| match number {
        0 => Said { headers: vec![(header::RETRY_AFTER, "1".into())], ..Said::error(429, "slow down") },
        1 => Said::error(500, "oops"),
        2 => Said::new(200, "{\"choices\": [{\"mess"),
        3 => Said::new(503, ""),
        _ => Said::text("at last"),
    })
    .await;
    let began = Instant::now();
    assert_eq!(texts(&ask(&endpoint(&[&server.address], ""), 1).await.unwrap()), ["at last"]);
    assert!(began.elapsed() >= Duration::from_secs(1), "the server's wish was not heeded");
    assert_eq!(server.asked().len(), 5);
    let bodies = server.asked();
    assert!(bodies.iter().all(|body| *body == bodies[0]), "asked again for the same");
}

#[tokio::test]
async fn retries_are_bounded_and_the_last_failure_is_told() {
    let malformed = Server::start(|_, _| Said::new(200, "<html>no</html>")).await;
    let message = told(ask(&endpoint(&[&malformed.address], "retries = 1"), 1).await, is_passing);
    assert!(message.contains("model gpt: asked 2 times") && message.contains("no chat completion"), "{message}");
    assert_eq!(malformed.asked().len(), 2);

    let slow = Server::start(|_, _| Said { after: Duration::from_secs(60), ..Said::text("late") }).await;
    let message = told(ask(&endpoint(&[&slow.address], "timeout = 0.2\nretries = 1"), 1).await, is_passing);
    assert!(message.contains("gave no answer within 0.2 s"), "{message}");

    let message = told(ask(&endpoint(&[&nowhere().await], "retries = 0"), 1).await, is_passing);
    assert!(message.contains("asked once") && message.contains("Connection refused"), "{message}");

    // A server that hangs up in the middle of its answer.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    told(ask(&endpoint(&[&address], "retries = 1"), 1).await, is_passing);
}

#[tokio::test]
async fn an_address_that_is_down_is_left_to_rest() {
    let server = Server::start(|_, _| Said::text("here")).await;
    let endpoint = endpoint(&[&nowhere().await, &server.address], "");
    for _ in 0..40 {
        assert_eq!(texts(&ask(&endpoint, 1).await.unwrap()), ["here"]);
    }
    assert_eq!(server.asked().len(), 40);
}

#[tokio::test]
async fn what_is_the_rows_own_fault_fails_the_row() {
    let long = format!("too long{}", " and longer".repeat(1000));
    let server = Server::start(move |number, _| match number {
        0 => Said::error(400, &long),
        1 => Said::error(422, "no"),
        2 => Said::new(200, vec![b' '; (16 << 20) + 1]),
        _ => Said::new(200, r#"{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}"#),
    })
    .await;
    let endpoint = endpoint(&[&server.address], "");
    for expected in ["too long and longer", "422 Unprocessable Entity: no", "longer than 16 MiB", "withheld"] {
        let message = told(ask(&endpoint, 1).await, is_row);
        assert!(message.contains(expected) && message.len() < 500, "{message}");
    }
    assert_eq!(server.asked().len(), 4, "none was asked again");
}

#[tokio::test]
async fn an_empty_answer_is_one() {
    let server = Server::start(|_, _| Said::new(200, r#"{"choices": [{"message": {"content": ""}}]}"#)).await;
    let reply = ask(&endpoint(&[&server.address], ""), 1).await.unwrap();
    assert_eq!((texts(&reply), reply.prompt_tokens, reply.generation_tokens), (vec![""], None, None));
}

#[tokio::test]
async fn what_the_user_has_to_put_right_is_told_at_once() {
    for (status, keys, expected) in [
        (401, "", "name a key with `api_key"),
        (401, "api_key = 'hunter2'", "the key in `api_key` is not accepted"),
        (403, "api_key = 'hunter2'", "403 Forbidden: you sent ***"),
        (404, "", "does the server have a model \"big\"?"),
        (405, "", "405"),
        (308, "", "write the address that the server points to"),
    ] {
        let server = Server::start(move |_, _| Said {
            headers: vec![(header::LOCATION, "http://elsewhere.invalid/".into())],
            ..Said::error(status, "you sent hunter2")
        })
        .await;
        let message = told(ask(&endpoint(&[&server.address], keys), 1).await, is_user);
        assert!(message.contains(expected) && message.contains(&server.address), "{message}");
        assert!(message.starts_with("model gpt: ") && server.asked().len() == 1, "{message}");
        assert!(keys.is_empty() || !message.contains("hunter2"), "{message}");
    }
}

/// Answers one request a connection over TLS, with a certificate that no authority vouches for.
async fn tls_server() -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::crypto::aws_lc_rs::default_provider;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

    let certificate = CertificateDer::from_pem_file(fixture("cert.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(fixture("key.pem")).unwrap();
    let config =
        ServerConfig::builder_with_provider(Arc::new(default_provider())).with_safe_default_protocol_versions();
    let config = config.unwrap().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("https://{}/v1", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let Ok(mut socket) = acceptor.accept(socket).await else { continue };
            let _ = socket.read(&mut [0; 4096]).await;
            let body = String::from_utf8(Said::text("trusted").body).unwrap();
            let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = socket.write_all(format!("{head}{body}").as_bytes()).await;
            let _ = socket.shutdown().await;
        }
    });
    address
}

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_nobody_vouches_for_is_told_at_once() {
    let address = tls_server().await;
    let began = Instant::now();
    let message = told(ask(&endpoint(&[&address], "retries = 9"), 1).await, is_user);
    assert!(message.contains("can't be trusted: invalid peer certificate"), "{message}");
    assert!(message.contains("SSL_CERT_FILE") && began.elapsed() < Duration::from_secs(5), "{message}");

    let plain = Server::start(|_, _| Said::text("")).await;
    let address_of_plain = plain.address.replace("http:", "https:");
    let message = told(ask(&endpoint(&[&address_of_plain], "retries = 9"), 1).await, is_user);
    assert!(message.contains("does not speak TLS"), "{message}");

    // The remedy in the message is one.
    let case = Case::new(1, &flow(&address, ""));
    let output = tokio::task::block_in_place(|| {
        let mut command = case.command(&["flow.toml"]);
        without_proxy(&mut command).env("SSL_CERT_FILE", fixture("cert.pem")).output().unwrap()
    });
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(case.texts(1, "sample/rows", "generation"), ["trusted", "trusted"]);
}

#[tokio::test]
async fn requests_in_flight_and_a_minute_are_limited() {
    let server = Server::start(|_, _| Said { after: Duration::from_millis(30), ..Said::text("a") }).await;
    let three = endpoint(&[&server.address], "concurrency = 3");
    futures::future::join_all((0..12).map(|_| ask(&three, 1))).await.into_iter().for_each(|reply| drop(reply.unwrap()));
    assert_eq!(server.most_in_flight.load(SeqCst), 3);

    let paced = endpoint(&[&server.address], "requests_per_minute = 600");
    let began = Instant::now();
    futures::future::join_all((0..6).map(|_| ask(&paced, 1))).await.into_iter().for_each(|reply| drop(reply.unwrap()));
    assert!(began.elapsed() >= Duration::from_millis(500), "{:?}", began.elapsed());
}

#[tokio::test]
async fn metrics_count_what_came_of_requests() {
    let server = Server::start(|number, _| match number {
        0 => Said::error(500, ""),
        _ => Said::text("a"),
    })
    .await;
    let (metrics, rendered) = prometheus::recorder("test").unwrap();
    let spec: ModelSpec = toml::from_str(&format!("endpoint = {:?}\nname = 'big'", server.address)).unwrap();
    let endpoint = Endpoint::new("gpt", spec.endpoint.unwrap(), None, metrics).unwrap();
    ask(&endpoint, 1).await.unwrap();
    let text = rendered.render();
    for line in [
        "flowrun_endpoint_requests_total{flow=\"test\",model=\"gpt\",outcome=\"ok\"} 1",
        "flowrun_endpoint_requests_total{flow=\"test\",model=\"gpt\",outcome=\"server\"} 1",
        "flowrun_endpoint_retries_total{flow=\"test\",model=\"gpt\",reason=\"server\"} 1",
        "flowrun_endpoint_request_seconds_count{flow=\"test\",model=\"gpt\"} 2",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

/// Prompts, answers of the server, its own verdicts on them, and what is left as a file.
fn flow(address: &str, keys: &str) -> String {
    format!(
        r#"
name = "tiny"
max_dead_letters = 0.5
[models.gpt]
endpoint = [{address:?}]
name = "big"
{keys}
[stages.prompts]
kind = "source"
dataset = "prompts.jsonl"
select = {{ prompt = "prompt" }}
[stages.sample]
kind = "sampler"
input = "prompts"
model = "gpt"
candidates = 2
max_new_tokens = 12
[stages.judge]
kind = "judge"
input = "sample"
model = "gpt"
read = "text"
[stages.prefer]
kind = "mapper"
input = "judge"
sql = "SELECT prompt, chosen, rejected, chosen_ids FROM input WHERE verdict <> 'tie'"
[stages.out]
kind = "sink"
input = "prefer"
path = "pairs.jsonl"
"#
    )
}

fn without_proxy(command: &mut std::process::Command) -> &mut std::process::Command {
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(name);
    }
    command
}

/// Runs the program with a key in its environment.
fn run(case: &Case, args: &[&str]) -> std::process::Output {
    tokio::task::block_in_place(|| without_proxy(&mut case.command(args)).env("GPT_KEY", "hunter2").output().unwrap())
}

fn content(request: &Value) -> &str {
    request["messages"][0]["content"].as_str().unwrap()
}

/// Two answers to a prompt, of which the longer is better; the prompt number 3 can't be answered.
fn whole(request: &Value) -> Said {
    let prompt = content(request);
    if request["n"] != 2 {
        let first_is_long = prompt.find("a long answer").unwrap() < prompt.find("short").unwrap();
        return Said::text(if first_is_long { "Response A" } else { "Response B" });
    }
    match prompt.contains("number 3") {
        true => Said::error(400, "I won't"),
        false => Said::texts(&["a long answer", "short"]),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_flow_and_again_without_a_request() {
    let server = Server::start(|_, request| whole(request)).await;
    let case = Case::new(8, &flow(&server.address, "api_key = \"${GPT_KEY}\""));
    let output = run(&case, &["flow.toml"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(case.texts(1, "sample/rows", "generation"), ["a long answer", "short"].repeat(7));
    assert_eq!(case.texts(1, "sample/rows", "prompt_tokens"), ["11"; 14]);
    assert_eq!(case.texts(1, "sample/rows", "logprob"), [""; 14]);
    assert_eq!(case.texts(1, "judge/rows", "verdict"), ["a"; 7]);
    assert_eq!(case.texts(1, "prefer/rows", "chosen"), ["a long answer"; 7]);
    let kept = std::fs::read_to_string(case.path("runs/tiny/pairs.jsonl")).unwrap();
    assert_eq!(kept.lines().count(), 7);
    let dead = case.texts(1, "../dead_letters", "reason");
    assert_eq!(dead.len(), 1);
    assert!(dead[0].contains("400 Bad Request: I won't"), "{dead:?}");
    let asked = server.asked();
    assert_eq!(asked.len(), 8 + 7);
    assert!(asked.iter().all(|request| request["authorization"] == "Bearer hunter2"));
    for file in ["flow.toml", "plan.json", "summary.json", "metrics.jsonl"] {
        let text = std::fs::read_to_string(case.path("runs/tiny").join(file)).unwrap();
        assert!(!text.contains("hunter2"), "{file}");
    }
    assert!(!stderr(&output).contains("hunter2"));

    // Dead letters are tried again where somebody wants it, and nothing else.
    assert!(run(&case, &["flow.toml"]).status.success());
    assert_eq!(server.asked().len(), asked.len());
    assert_eq!(case.texts(1, "../dead_letters", "reason").len(), 1);
    assert!(run(&case, &["flow.toml", "--retry-dead"]).status.success());
    let again = server.asked().split_off(asked.len());
    assert!(again.len() == 1 && content(&again[0]).contains("number 3"), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_goes_away_is_asked_for_the_rest_when_it_is_back() {
    let away = Arc::new(AtomicUsize::new(1));
    let gone = away.clone();
    let server = Server::start(move |number, request| match number >= 9 && gone.load(SeqCst) == 1 {
        true => Said::error(503, "away"),
        false => whole(request),
    })
    .await;
    let text = flow(&server.address, "retries = 0\nconcurrency = 1").replace("number 3", "no number");
    let case = Case::new(8, &text);
    let output = run(&case, &["flow.toml"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("503 Service Unavailable: away"), "{}", stderr(&output));
    assert!(stderr(&output).contains("help: what is finished is kept"), "{}", stderr(&output));
    let before = server.asked().len();
    away.store(0, SeqCst);
    let output = run(&case, &["flow.toml"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(server.asked().len() - before <= 15 - 9 + 1, "what was answered is asked again");
    assert_eq!(case.texts(1, "judge/rows", "verdict"), ["a"; 7]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_endpoint_can_not_do_is_refused_before_it_is_asked() {
    let server = Server::start(|_, request| whole(request)).await;
    let good = flow(&server.address, "api_key = \"${GPT_KEY}\"");
    let refused = |from: &str, to: &str, words: &[&str]| {
        assert!(good.contains(from), "{from}");
        let case = Case::new(2, &good.replace(from, to));
        let output = run(&case, &["check", "flow.toml"]);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{to}: {message}");
        for word in words.iter().chain(&["flow.toml:", "help: "]) {
            assert!(message.contains(word), "{word:?} is not in:\n{message}");
        }
        assert!(message.lines().count() <= 4 && !message.contains("hunter2"), "{message}");
    };
    let sampler = "candidates = 2";
    for (key, remedy) in [
        ("top_k = 5", "use top_p"),
        ("min_p = 0.1", "use top_p"),
        ("repetition_penalty = 1.1", "use presence_penalty"),
        ("stop_token_ids = [3]", "use stop"),
        ("logprobs = true", "leave it out"),
        ("device = \"cpu\"", "leave it out"),
        ("adapter = \"base\"", "leave it out"),
    ] {
        let name = key.split(' ').next().unwrap();
        refused(sampler, key, &[&format!("stages.sample.{name}"), remedy]);
    }
    refused("read = \"text\"", "read = \"logits\"", &["stages.judge.read", "use read = \"text\""]);
    refused("read = \"text\"", "", &["stages.judge.read", "use read = \"text\""]);
    refused("name = \"big\"", "name = \"big\"\nsource = \"x\"", &["models.gpt.endpoint", "not both"]);
    refused("name = \"big\"", "name = \"big\"\ndtype = \"f32\"", &["models.gpt.dtype"]);
    refused("name = \"big\"", "nmae = \"big\"", &["models.gpt.nmae", "did you mean `name`?"]);
    let more = |kind: &str| {
        let select = "SELECT prompt, chosen, rejected, chosen_ids, chosen AS completion";
        good.replace("SELECT prompt, chosen, rejected, chosen_ids", select) + kind
    };
    for (kind, words) in [
        ("[stages.s]\nkind = \"scorer\"\ninput = \"prefer\"\nmodel = \"gpt\"\n", "stages.s.model: `gpt` answers at"),
        (
            "[stages.t]\nkind = \"trainer\"\ntrain = \"prefer\"\nmodel = \"gpt\"\nlearning_rate = 1\n",
            "can't be trained",
        ),
    ] {
        let case = Case::new(2, &more(kind));
        let output = run(&case, &["check", "flow.toml"]);
        assert!(output.status.code() == Some(2) && stderr(&output).contains(words), "{}", stderr(&output));
    }

    let case = Case::new(2, &good);
    let output = run(&case, &["check", "flow.toml"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains(&format!("gpt: big at {}", server.address)), "{text}");
    assert!(text.contains(&format!("model gpt at {}", server.address)), "{text}");
    let output = case.run(&["check", "flow.toml"]);
    assert!(stderr(&output).contains("flow.toml:7: models.gpt.api_key: the environment variable GPT_KEY is not set"));
    assert!(server.asked().is_empty(), "check asked the server");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_an_endpoint_are_trained_on() {
    let server = Server::start(|_, request| whole(request)).await;
    let trainer = format!(
        "[models.policy]\nsource = {:?}\ndtype = \"f32\"\n[stages.align]\nkind = \"trainer\"\ntrain = \"prefer\"\n\
         model = \"policy\"\ndevice = \"cpu:0\"\nlearning_rate = 1e-3\nlora = {{ r = 4, alpha = 8 }}\n",
        tiny_model()
    );
    let case = Case::new(8, &(flow(&server.address, "") + &trainer));
    let output = run(&case, &["flow.toml"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(case.summary()["rounds"][0]["train"]["pairs"], 7, "{}", case.summary()["rounds"][0]["train"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn body_and_headers_are_sent_and_no_header_is_shown() {
    let server = Server::start(|_, request| match request["team"] == "hunter2" {
        true => whole(request),
        false => Said::error(401, "X-Team: hunter2 is wanted"),
    })
    .await;
    let keys = "headers = { X-Team = \"${GPT_KEY}\" }\nbody = { chat_template_kwargs = { enable_thinking = false }, top_p = 0.5 }";
    let case = Case::new(3, &flow(&server.address, keys));
    let output = run(&case, &["flow.toml"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let asked = server.asked();
    assert!(asked.iter().all(|request| request["chat_template_kwargs"] == json!({ "enable_thinking": false })));
    assert!(asked.iter().all(|request| request["top_p"] == 0.5 && request["max_tokens"].is_u64()));
    for file in ["flow.toml", "plan.json", "summary.json", "metrics.jsonl"] {
        let text = std::fs::read_to_string(case.path("runs/tiny").join(file)).unwrap();
        assert!(!text.contains("hunter2"), "{file}");
    }
    let written = std::fs::read_to_string(case.path("runs/tiny/flow.toml")).unwrap();
    assert!(written.contains("${GPT_KEY}"), "a variable stays as it was written");

    let wrong = keys.replace("${GPT_KEY}", "hunter3 hunter2");
    let output = run(&Case::new(1, &flow(&server.address, &wrong)), &["flow.toml"]);
    assert!(stderr(&output).contains("X-Team: *** is wanted"), "{}", stderr(&output));
}

#[tokio::test]
async fn a_server_that_refuses_max_tokens_is_asked_with_max_completion_tokens() {
    let server = Server::start(|_, request| match request.get("max_tokens") {
        Some(_) => Said::error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        None => Said::text("here"),
    })
    .await;
    let learns = endpoint(&[&server.address], "retries = 0");
    for _ in 0..2 {
        assert_eq!(texts(&ask(&learns, 1).await.unwrap()), ["here"]);
    }
    let limits: Vec<_> = server.asked().iter().map(|asked| asked["max_completion_tokens"].as_u64()).collect();
    assert_eq!(limits, [None, Some(32), Some(32)], "it is refused once");
    // The flow may say so from the first.
    let told = endpoint(&[&server.address], "body = { max_completion_tokens = 64 }");
    assert_eq!(texts(&ask(&told, 1).await.unwrap()), ["here"]);
    assert_eq!(server.asked()[3]["max_completion_tokens"], 64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_of_every_row_ends_the_run_at_once_in_the_servers_words() {
    let server = Server::start(|_, _| Said::error(400, "'temperature' does not support 1.0 with this model")).await;
    let case = Case::new(40, &flow(&server.address, "concurrency = 2"));
    let output = run(&case, &["flow.toml"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("'temperature' does not support 1.0 with this model"), "{}", stderr(&output));
    assert!(server.asked().len() < 10, "{}", server.asked().len());

    // Where some are answered, the others are dead letters.
    let server = Server::start(|_, request| match content(request).contains("number 1") {
        true => Said::error(400, "no"),
        false => whole(request),
    })
    .await;
    let case = Case::new(16, &flow(&server.address, "concurrency = 1").replace("number 3", "no number"));
    let output = run(&case, &["flow.toml"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(case.texts(1, "../dead_letters", "reason").len(), 7 + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_are_all_empty_are_told() {
    let server = Server::start(|_, request| match request["n"] == 2 {
        true => {
            let choice =
                json!({ "message": { "content": null, "reasoning_content": "Hm" }, "finish_reason": "length" });
            Said::new(200, json!({ "choices": [choice, choice] }).to_string())
        }
        false => Said::text("Tie"),
    })
    .await;
    let output = run(&Case::new(3, &flow(&server.address, "")), &["flow.toml"]);
    assert!(stderr(&output).contains("all 6 answers are empty: they were cut off"), "{}", stderr(&output));
}
