//! How deep a query's expressions nest. They are planned and evaluated by recursion, and a stack that overflows ends
//! the whole process.

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{Expr, Visit, Visitor};
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::parser::Parser;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};

/// The deepest expression; 1 + 1 + 1 is two deep.
const DEEPEST: usize = 100;
/// The parser's own limit is 50, and beyond it the parser tries all readings of every level.
const DEEPEST_PARENTHESES: usize = 45;
/// Joins and set operations of one query.
const MOST_TABLES: usize = 100;
/// Tokens other than commas and values: a text of more could overflow the stack that it is looked at with.
const MOST_TOKENS: usize = 20_000;
/// Bytes of stack that a query of so many tokens is looked at with.
const STACK: usize = 512 << 20;
/// No shorter text nests too deep.
const SHORT: usize = DEEPEST * 2;

/// Says what of a query nests too deep; what can't be parsed is the planner's to tell.
pub fn fault(sql: &str) -> Option<String> {
    if sql.len() < SHORT {
        return None;
    }
    let tokens = Tokenizer::new(&GenericDialect {}, sql).tokenize().ok()?;
    let is_table = |token: &&Token| {
        matches!(token, Token::Word(word) if matches!(
            word.keyword,
            Keyword::UNION | Keyword::EXCEPT | Keyword::INTERSECT | Keyword::JOIN
        ))
    };
    if tokens.iter().filter(is_table).count() > MOST_TABLES {
        return Some(format!("the query has more than {MOST_TABLES} joins and set operations"));
    }
    let is_flat = |token: &&Token| {
        matches!(token, Token::Whitespace(_) | Token::Comma | Token::Number(..) | Token::SingleQuotedString(_))
    };
    let deep = || {
        Some(format!(
            "an expression nests more than {DEEPEST} deep; use IN or concat, or compute it in steps in several mappers"
        ))
    };
    if nesting(&tokens) > DEEPEST_PARENTHESES || tokens.iter().filter(|token| !is_flat(token)).count() > MOST_TOKENS {
        return deep();
    }
    let sql = sql.to_owned();
    let look = std::thread::Builder::new().stack_size(STACK).spawn(move || is_deep(&sql)).ok()?;
    if look.join().unwrap_or(true) { deep() } else { None }
}

/// How deep parentheses nest.
fn nesting(tokens: &[Token]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    for token in tokens {
        match token {
            Token::LParen | Token::LBracket | Token::LBrace => depth += 1,
            Token::RParen | Token::RBracket | Token::RBrace => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

fn is_deep(sql: &str) -> bool {
    struct Depth(usize);
    impl Visitor for Depth {
        type Break = ();

        fn pre_visit_expr(&mut self, _: &Expr) -> ControlFlow<()> {
            self.0 += 1;
            if self.0 > DEEPEST { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }

        fn post_visit_expr(&mut self, _: &Expr) -> ControlFlow<()> {
            self.0 -= 1;
            ControlFlow::Continue(())
        }
    }
    let Ok(statements) = Parser::parse_sql(&GenericDialect {}, sql) else { return false };
    statements.visit(&mut Depth(0)).is_break()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nests_too_deep_is_told() {
        let chain = |word: &str, times: usize| vec![word; times].join("");
        for deep in [
            format!("SELECT {}1 AS x FROM input", chain("1+", 300)),
            format!("SELECT {}1 AS x FROM input", chain("1+", 60_000)),
            format!("SELECT 1{} AS x FROM input", chain("::int", 3000)),
            format!("SELECT {}1{} AS x FROM input", chain("CAST(", 3000), chain(" AS INT)", 3000)),
            format!("SELECT * FROM input WHERE {}a = 1", chain("a = 1 OR ", 2000)),
            format!("SELECT 1 AS x FROM input {}", chain("UNION ALL SELECT 1 AS x FROM input ", 2000)),
        ] {
            assert!(fault(&deep).is_some(), "{}", &deep[..60]);
        }
        for flat in [
            format!("SELECT * FROM input WHERE a IN ({}1)", chain("1, ", 50_000)),
            format!("SELECT CASE {} END AS x FROM input", chain("WHEN a = 1 THEN b ", 1000)),
            format!("SELECT {}1 AS x FROM input", chain("1+", 90)),
            format!("SELECT '{}' AS x FROM input", chain("1+", 1000)),
            chain("not sql ", 100),
        ] {
            assert_eq!(fault(&flat), None, "{}", &flat[..60]);
        }
    }
}
