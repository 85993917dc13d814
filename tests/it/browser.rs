//! A real browser and a person's hands: Chromium, driven over WebDriver (Debian's packages chromium and
//! chromium-driver).

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::blocking::Client;
use serde_json::{Value, json};

/// What the WebDriver protocol calls an element.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

pub struct Browser {
    driver: Child,
    client: Client,
    /// Of all that is asked of the session.
    url: String,
    _profile: tempfile::TempDir,
}

/// Which window a page is shown in.
pub enum Window {
    Desktop,
    Phone,
}

impl Browser {
    /// None where there is no driver, which is said.
    pub fn start(window: Window) -> Option<Self> {
        let driver = Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let Ok(mut driver) = driver else {
            println!("skipped: there is no chromedriver here");
            return None;
        };
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines().map(Result::unwrap);
        // The first line has the 0 that was asked for.
        let port =
            |line: String| line.split("on port ").nth(1)?.trim_end_matches('.').parse::<u16>().ok().filter(|p| *p > 0);
        let port = lines.find_map(port).expect("the driver tells its port");
        std::thread::spawn(move || lines.count());
        let client = Client::builder().timeout(Duration::from_secs(60)).build().unwrap();
        let profile = tempfile::tempdir().unwrap();
        let size = match window {
            Window::Desktop => "--window-size=1280,1000",
            Window::Phone => "--window-size=500,900",
        };
        let data = format!("--user-data-dir={}", profile.path().display());
        let args = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-quic",
        ];
        let quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"];
        let args: Vec<&str> = args.into_iter().chain(quiet).chain([size, &data]).collect();
        let mut options = json!({ "args": args });
        if let Window::Phone = window {
            let metrics = json!({ "width": 390, "height": 844, "pixelRatio": 2.0, "touch": true });
            options["mobileEmulation"] = json!({ "deviceMetrics": metrics });
        }
        let wanted = json!({ "browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": { "browser": "ALL" } });
        let url = format!("http://127.0.0.1:{port}/session");
        let session = answer(client.post(&url).json(&json!({ "capabilities": { "alwaysMatch": wanted } })));
        let url = format!("{url}/{}", session["sessionId"].as_str().unwrap());
        Some(Self { driver, client, url, _profile: profile })
    }

    fn ask(&self, what: &str, body: Value) -> Value {
        answer(self.client.post(format!("{}/{what}", self.url)).json(&body))
    }

    /// Shows a page of a report and waits until it is drawn.
    pub fn show(&self, page: &Path, view: &str) {
        let url = format!("file://{}{view}", page.canonicalize().unwrap().display());
        // The same page with another view would only be told of the change.
        self.ask("url", json!({ "url": "about:blank" }));
        self.ask("url", json!({ "url": url }));
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.run("return document.body.dataset.ready === 'true'") != true {
            assert!(Instant::now() < deadline, "not drawn: {:?}", self.complaints());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What a script of the page gives back.
    pub fn run(&self, script: &str) -> Value {
        self.ask("execute/sync", json!({ "script": script, "args": [] }))
    }

    fn find(&self, css: &str) -> String {
        let found = self.ask("element", json!({ "using": "css selector", "value": css }));
        found[ELEMENT].as_str().unwrap_or_else(|| panic!("{css}: {found}")).to_owned()
    }

    pub fn click(&self, css: &str) {
        let element = self.find(css);
        self.run(&format!("document.querySelector({css:?}).scrollIntoView({{ block: 'center' }})"));
        self.ask(&format!("element/{element}/click"), json!({}));
    }

    /// Keys for an element: text, or one of the private characters that WebDriver has for others.
    pub fn press(&self, css: &str, keys: &str) {
        let element = self.find(css);
        self.ask(&format!("element/{element}/value"), json!({ "text": keys }));
    }

    pub fn text(&self, css: &str) -> String {
        let element = self.find(css);
        answer(self.client.get(format!("{}/element/{element}/text", self.url))).as_str().unwrap().to_owned()
    }

    /// What the page's console was told.
    pub fn complaints(&self) -> Vec<Value> {
        self.ask("se/log", json!({ "type": "browser" })).as_array().cloned().unwrap_or_default()
    }
}

fn answer(request: reqwest::blocking::RequestBuilder) -> Value {
    let mut answer: Value = request.send().unwrap().json().unwrap();
    let value = answer["value"].take();
    assert!(value.get("error").is_none(), "{value}");
    value
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The browser ends with its session, the driver by itself.
        let _ = self.client.delete(&self.url).send();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
