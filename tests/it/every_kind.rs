//! A flow with a stage of every built-in kind that reads a file, on the tiny model.

use crate::support::{Case, tiny_model};

/// The kinds whose rows come from, or go to, the program that embeds flowrun: they have no keys.
pub const OF_PROGRAMS: [&str; 2] = ["feed", "tap"];

/// A directory with the flow and all that it reads. `far` is a model at a server that nobody asks while it is planned.
pub fn case() -> Case {
    let case = Case::new(24, &flow());
    for folder in ["configs", "configs/a", "configs/b"] {
        std::fs::create_dir(case.path(folder)).unwrap();
    }
    case.write("both.csv", &format!("prompt,n;prompt\n{}", "x,y;z\n".repeat(24)));
    std::fs::create_dir(case.path("parts")).unwrap();
    for (name, about) in [
        ("other.jsonl", "something else"),
        ("parts/train.jsonl", "a part"),
        ("parts/test.jsonl", "the rest"),
        ("configs/a/0.jsonl", "a"),
        ("configs/b/0.jsonl", "b"),
    ] {
        let lines: String = (0..12).map(|n| format!("{{\"prompt\": \"{about} {n}\", \"n\": {n}}}\n")).collect();
        case.write(name, &lines);
    }
    let turns = |answer: &str| {
        format!("[{{\"role\": \"user\", \"content\": \"q\"}}, {{\"role\": \"assistant\", \"content\": \"{answer}\"}}]")
    };
    let [said, other] = [turns("x"), turns("y")];
    let form = format!(
        "{{\"prompt\": \"q\", \"messages\": {said}, \"chosen\": {said}, \"rejected\": {other}, \"x\": \"1\", \"y\": \"2\", \"z\": \
         [\"3\", \"4\"], \"w\": \"5\"}}\n"
    );
    case.write("forms.jsonl", &form.repeat(12));
    let script = |score: &str| {
        format!(
            "while IFS= read -r line; do key=${{line#*\\\"_key\\\":}}; key=${{key%%[!0-9]*}}; \
             echo \"{{\\\"_key\\\":$key,\\\"points\\\":{score}}}\"; done\n"
        )
    };
    case.write("reward.sh", &script("1"));
    case.write("other.sh", &script("2"));
    case
}

/// Stage by stage; those of one kind show what one of them can't.
fn flow() -> String {
    let model = tiny_model();
    format!(
        r#"
name = "tiny"
rounds = 2
seed = 1
deterministic = true

[models.policy]
source = {model:?}
dtype = "f32"

[models.far]
endpoint = "http://127.0.0.1:9/v1"
name = "m"

[stages.prompts]
kind = "source"
dataset = "prompts.jsonl"
select = {{ prompt = "prompt", n = "n" }}
shard = {{ count = 2 }}

[stages.queried]
kind = "source"
dataset = "prompts.jsonl"
sql = "SELECT prompt FROM dataset"
take = 4

[stages.sample]
kind = "sampler"
input = "prompts"
model = "policy"
max_new_tokens = 8

[stages.pairwise]
kind = "judge"
input = "sample"
model = "policy"
device = "cpu:1"

[stages.written]
kind = "judge"
input = "sample"
model = "policy"
read = "text"
prompt = "{{prompt}} {{label_first}}: {{first}} {{label_second}}: {{second}}"

[stages.scored]
kind = "judge"
input = "sample"
model = "policy"
device = "cpu:1"
method = "score"
max_new_tokens = 8
prompt = "From {{low}} to {{high}}, how well does {{answer}} answer {{prompt}}?"

[stages.ruled]
kind = "judge"
input = "sample"
method = "rule"
rule = "length(generation) + _candidate"

[stages.prefer]
kind = "pairs"
input = "ruled"

[stages.completed]
kind = "mapper"
input = "prefer"
sql = "SELECT prompt, chosen, rejected, chosen AS completion FROM input"

[stages.likely]
kind = "scorer"
input = "completed"
model = "policy"
device = "cpu:1"

[stages.rewarded]
kind = "process"
input = "prompts"
command = ["sh", "reward.sh"]
columns = {{ points = "i64" }}

[stages.kept]
kind = "sink"
input = "rewarded"
path = "rewarded-{{round}}.jsonl"

[stages.halves]
kind = "split"
input = "completed"
outputs = {{ train = 0.75, validation = 0.25 }}

[stages.align]
kind = "trainer"
train = "halves.train"
validation = "halves.validation"
model = "policy"
device = "cpu:1"
start = "continue"
reference = "previous"
learning_rate = 1e-3
lora = {{ r = 4, alpha = 8 }}

[stages.gate]
kind = "gate"
input = "queried"
model = "policy"
device = "cpu:0"
max_new_tokens = 8
otherwise = "keep"
judge = {{ method = "rule", rule = "length(generation)" }}
"#
    )
}
