//! Small tasks whose answers are known, made from a seed.
//!
//! Training and held-out questions come from disjoint worlds: a pair of numbers, a triple or a word that one of
//! them asks about never stands in the other, in whatever order.

use serde::Serialize;

/// One question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Task {
    pub task: &'static str,
    pub prompt: String,
    pub answer: String,
}

/// The two worlds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum World {
    Training,
    HeldOut,
}

/// What is trained and measured.
pub const TASKS: [&str; 3] = ["sum", "last", "largest"];

/// What is measured only: skills beside the trained ones.
pub const OTHERS: [&str; 3] = ["first", "smallest", "difference"];

const TRAINING_WORDS: [&str; 40] = [
    "apple", "river", "stone", "cloud", "table", "horse", "window", "garden", "bread", "music", "paper", "train",
    "bottle", "forest", "silver", "pencil", "market", "winter", "butter", "castle", "engine", "flower", "guitar",
    "hammer", "island", "jacket", "kitten", "ladder", "mirror", "needle", "orange", "pocket", "rabbit", "saddle",
    "ticket", "valley", "wallet", "yellow", "basket", "candle",
];

const HELD_OUT_WORDS: [&str; 40] = [
    "bridge", "doctor", "eagle", "finger", "glove", "honey", "insect", "jungle", "kettle", "lemon", "monkey", "night",
    "ocean", "planet", "queen", "rocket", "shadow", "tiger", "uncle", "violin", "water", "zebra", "anchor", "branch",
    "circle", "desert", "elbow", "feather", "giant", "hotel", "iron", "jewel", "knife", "leaf", "mountain", "number",
    "onion", "pepper", "ring", "sugar",
];

/// `each` different questions of each of `tasks`, one task after the other in turn.
pub fn make(world: World, tasks: &[&'static str], each: usize, seed: u64) -> Vec<Task> {
    let mut random = Random(seed);
    let mut made: Vec<Task> = Vec::new();
    while made.len() < each * tasks.len() {
        let task = question(world, tasks[made.len() % tasks.len()], &mut random);
        if let Some(task) = task.filter(|task| made.iter().all(|other| other.prompt != task.prompt)) {
            made.push(task);
        }
    }
    made
}

/// `None` where the drawn numbers are of the other world.
fn question(world: World, task: &'static str, random: &mut Random) -> Option<Task> {
    let (prompt, answer) = match task {
        "sum" | "difference" => {
            let (a, b) = (10 + random.below(90), 10 + random.below(90));
            if world_of(&[a, b]) != world {
                return None;
            }
            if task == "sum" {
                (format!("What is {a} + {b}? Reply with the number only."), a + b)
            } else {
                let (a, b) = (a.max(b), a.min(b));
                (format!("What is {a} - {b}? Reply with the number only."), a - b)
            }
        }
        "largest" | "smallest" => {
            let numbers = [(); 3].map(|()| 10 + random.below(90));
            let distinct = numbers[0] != numbers[1] && numbers[1] != numbers[2] && numbers[0] != numbers[2];
            if world_of(&numbers) != world || !distinct {
                return None;
            }
            let [a, b, c] = numbers;
            let answer = if task == "largest" { a.max(b).max(c) } else { a.min(b).min(c) };
            (format!("Which number is the {task}: {a}, {b} or {c}? Reply with the number only."), answer)
        }
        _ => {
            let words = if world == World::Training { &TRAINING_WORDS } else { &HELD_OUT_WORDS };
            let list: Vec<&str> = (0..4).map(|_| words[random.below(words.len() as u64) as usize]).collect();
            if (1..4).any(|i| list[..i].contains(&list[i])) {
                return None;
            }
            let prompt =
                format!("What is the {task} word in this list: {}? Reply with the word only.", list.join(", "));
            let answer = if task == "last" { list[3] } else { list[0] };
            return Some(Task { task, prompt, answer: answer.into() });
        }
    };
    Some(Task { task, prompt, answer: answer.to_string() })
}

/// Every third set of numbers is held out, whatever their order.
fn world_of(numbers: &[u64]) -> World {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    let mixed = sorted.iter().fold(0, |hash, n| Random(hash ^ n).next());
    if mixed.is_multiple_of(3) { World::HeldOut } else { World::Training }
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
