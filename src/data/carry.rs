//! Classifies a query, and passes the engine's columns through it.
//!
//! Every row has keys (`_row`, `_candidate`, ...) that later stages need, and sampled text has its token ids. A plain
//! `SELECT prompt, chosen` would drop them, so the logical plan is rewritten and each projection passes them on.
//! Token ids are passed on only with their unchanged text; ids of another text would be wrong.

use std::sync::Arc;

use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, DFSchema, JoinType};
use datafusion::error::Result;
use datafusion::logical_expr::{
    Distinct, Expr, LogicalPlan, LogicalPlanBuilder, Projection, SortExpr, Volatility, expr::ScalarFunction,
};

/// Columns passed on by every query that keeps the identity of rows.
const SYSTEM: [&str; 5] = ["_row", "_candidate", "_pair", "_source", "_part"];

/// Candidate numbers of a compared pair: keys as well, although without an underscore.
const WITH_PAIR: [&str; 2] = ["a_candidate", "b_candidate"];

/// Text columns, each with the columns that describe exactly that text.
const COMPANIONS: [(&str, [&str; 2]); 3] = [
    ("chosen", ["chosen_ids", "chosen_finish_reason"]),
    ("rejected", ["rejected_ids", "rejected_finish_reason"]),
    ("generation", ["generation_ids", "finish_reason"]),
];

/// Properties that decide how a query may be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    /// The output of an input row does not depend on other rows.
    pub row_wise: bool,
    pub unnests: bool,
    /// Calls a function like `random()` or `now()`: another run gives other rows.
    pub volatile: bool,
    /// `ORDER BY` decides the order of the result.
    pub ordered: bool,
    /// Contains a join, an aggregate or the like: without `ORDER BY` the order of the result is undefined.
    pub shuffles: bool,
}

pub fn classify(plan: &LogicalPlan) -> Result<Class> {
    let (mut scans, mut plain, mut unnests, mut volatile, mut shuffles) = (0, true, false, false, false);
    plan.apply_with_subqueries(|node| {
        match node {
            LogicalPlan::TableScan(_) => scans += 1,
            LogicalPlan::Unnest(_) => unnests = true,
            LogicalPlan::Projection(_) | LogicalPlan::Filter(_) | LogicalPlan::SubqueryAlias(_) => {}
            LogicalPlan::Sort(_) | LogicalPlan::Limit(_) => plain = false,
            _ => (plain, shuffles) = (false, true),
        }
        node.apply_expressions(|e| {
            volatile |= e.exists(|e| Ok(changes(e)))?;
            Ok(TreeNodeRecursion::Continue)
        })
    })?;
    Ok(Class { row_wise: plain && scans == 1 && !volatile, unnests, volatile, ordered: is_ordered(plan), shuffles })
}

/// Returns whether `expr` is a function whose value depends on more than its arguments.
fn changes(expr: &Expr) -> bool {
    matches!(expr, Expr::ScalarFunction(ScalarFunction { func, .. }) if func.signature().volatility != Volatility::Immutable)
}

fn is_ordered(plan: &LogicalPlan) -> bool {
    match plan {
        LogicalPlan::Sort(_) => true,
        LogicalPlan::Projection(_) | LogicalPlan::SubqueryAlias(_) | LogicalPlan::Limit(_) | LogicalPlan::Filter(_) => {
            plan.inputs().first().is_some_and(|input| is_ordered(input))
        }
        _ => false,
    }
}

/// Rewrites `plan` so that the engine's columns reach its output if rows keep their identity. Aggregates and unions
/// make new rows; nothing is added below them.
pub fn carry(plan: &LogicalPlan) -> Result<LogicalPlan> {
    match plan {
        LogicalPlan::Projection(p) => project(p),
        LogicalPlan::Distinct(Distinct::All(input)) => distinct(input),
        LogicalPlan::Filter(_)
        | LogicalPlan::SubqueryAlias(_)
        | LogicalPlan::Unnest(_)
        | LogicalPlan::Sort(_)
        | LogicalPlan::Limit(_)
        | LogicalPlan::Window(_)
        | LogicalPlan::Join(_) => {
            let inputs = plan.inputs().into_iter().map(carry).collect::<Result<Vec<_>>>()?;
            plan.with_new_exprs(plan.expressions(), inputs)
        }
        other => Ok(other.clone()),
    }
}

fn project(p: &Projection) -> Result<LogicalPlan> {
    let input = carry(&p.input)?;
    let mut exprs = p.expr.clone();
    let mut names: Vec<String> = p.schema.fields().iter().map(|f| f.name().clone()).collect();
    let mut add = |column: Column| {
        if !names.contains(&column.name) {
            names.push(column.name.clone());
            exprs.push(Expr::Column(column));
        }
    };
    for name in SYSTEM {
        if let Some(column) = find(input.schema(), name, None) {
            add(column);
        }
    }
    if let Some(pair) = find(input.schema(), "_pair", None) {
        for name in WITH_PAIR {
            if let Some(column) = find(input.schema(), name, Some(&pair)) {
                add(column);
            }
        }
    }
    for (text, companions) in COMPANIONS {
        let Some(column) = p.expr.iter().find_map(|e| passes(e, text)) else { continue };
        for name in companions {
            if let Some(companion) = find(input.schema(), name, Some(column)) {
                add(companion);
            }
        }
    }
    Ok(LogicalPlan::Projection(Projection::try_new(exprs, Arc::new(input))?))
}

/// Returns the column if `expr` is the column `name`, unchanged.
fn passes<'a>(expr: &'a Expr, name: &str) -> Option<&'a Column> {
    match expr {
        Expr::Column(column) if column.name == name => Some(column),
        Expr::Alias(alias) if alias.name == name => passes(&alias.expr, name),
        _ => None,
    }
}

/// Returns the first column called `name`; with `beside`, the one of the same table.
fn find(schema: &DFSchema, name: &str, beside: Option<&Column>) -> Option<Column> {
    schema
        .iter()
        .find(|(table, field)| field.name() == name && beside.is_none_or(|b| b.relation.as_ref() == *table))
        .map(Column::from)
}

/// DISTINCT over the columns that the user selected; of equal rows the first is kept with its keys.
fn distinct(input: &LogicalPlan) -> Result<LogicalPlan> {
    let carried = carry(input)?;
    let wanted = input.schema().columns();
    let keys: Vec<SortExpr> = ["_row", "_candidate", "_pair", "_part"]
        .iter()
        .filter_map(|name| find(carried.schema(), name, None))
        .filter(|column| !wanted.contains(column))
        .map(|column| Expr::Column(column).sort(true, true))
        .collect();
    if keys.is_empty() {
        return LogicalPlanBuilder::from(carried).distinct()?.build();
    }
    let on: Vec<Expr> = wanted.into_iter().map(Expr::Column).collect();
    let all: Vec<Expr> = carried.schema().columns().into_iter().map(Expr::Column).collect();
    // The sort of DISTINCT ON has to begin with its ON expressions.
    let sort = on.iter().map(|e| e.clone().sort(true, true)).chain(keys).collect();
    LogicalPlanBuilder::from(carried).distinct_on(on, all, Some(sort))?.build()
}

/// Returns the table that `_row` of the output comes from; `None` if the rows are new, or if an outer join may leave
/// it null.
pub fn rows_of(plan: &LogicalPlan) -> Option<String> {
    let at = plan.schema().fields().iter().position(|field| field.name() == "_row")?;
    origin(plan, at)
}

/// Returns the table from which column number `at` of the output comes unchanged.
fn origin(plan: &LogicalPlan, at: usize) -> Option<String> {
    let through = |input: &LogicalPlan, column: &Column| origin(input, input.schema().maybe_index_of_column(column)?);
    let own = || Some(Column::from(plan.schema().qualified_field(at)));
    match plan {
        // Another column may have been given the name on the way.
        LogicalPlan::TableScan(scan) if plan.schema().field(at).name() == "_row" => {
            Some(scan.table_name.table().to_owned())
        }
        LogicalPlan::Projection(p) => through(&p.input, passed(p.expr.get(at)?)?),
        LogicalPlan::Distinct(Distinct::On(d)) => through(&d.input, passed(d.select_expr.get(at)?)?),
        LogicalPlan::SubqueryAlias(alias) => origin(&alias.input, at),
        LogicalPlan::Filter(_)
        | LogicalPlan::Sort(_)
        | LogicalPlan::Limit(_)
        | LogicalPlan::Window(_)
        | LogicalPlan::Unnest(_)
        | LogicalPlan::Distinct(Distinct::All(_)) => through(plan.inputs().first()?, &own()?),
        LogicalPlan::Join(join) => {
            let (column, left) = (own()?, join.left.schema());
            match left.maybe_index_of_column(&column) {
                Some(at) if !matches!(join.join_type, JoinType::Right | JoinType::Full) => origin(&join.left, at),
                None if !matches!(join.join_type, JoinType::Left | JoinType::Full) => through(&join.right, &column),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Returns the column that an expression passes on, under any alias.
fn passed(expr: &Expr) -> Option<&Column> {
    match expr {
        Expr::Column(column) => Some(column),
        Expr::Alias(alias) => passed(&alias.expr),
        _ => None,
    }
}

/// Returns whether a row may become several: by UNNEST or by a join.
pub fn multiplies(plan: &LogicalPlan) -> Result<bool> {
    plan.exists(|node| {
        Ok(match node {
            LogicalPlan::Unnest(_) => true,
            LogicalPlan::Join(join) => {
                matches!(join.join_type, JoinType::Inner | JoinType::Left | JoinType::Right | JoinType::Full)
            }
            _ => false,
        })
    })
}

/// Makes the order total: adds every column to the outermost ORDER BY as a tie-breaker. Without this two runs could
/// give different rows with LIMIT.
pub fn break_ties(plan: &LogicalPlan) -> Result<LogicalPlan> {
    match plan {
        LogicalPlan::Sort(sort) => {
            let mut by = sort.expr.clone();
            for column in sort.input.schema().columns() {
                let expr = Expr::Column(column);
                if !by.iter().any(|s| s.expr == expr) {
                    by.push(expr.sort(true, true));
                }
            }
            LogicalPlanBuilder::from(sort.input.as_ref().clone()).sort_with_limit(by, sort.fetch)?.build()
        }
        LogicalPlan::Projection(_) | LogicalPlan::SubqueryAlias(_) | LogicalPlan::Limit(_) | LogicalPlan::Filter(_)
            if is_ordered(plan) =>
        {
            let inputs = plan.inputs().into_iter().map(break_ties).collect::<Result<Vec<_>>>()?;
            plan.with_new_exprs(plan.expressions(), inputs)
        }
        other => Ok(other.clone()),
    }
}

/// Returns the first output column that begins with `_` and is not passed on from the engine.
pub fn reserved_column(plan: &LogicalPlan) -> Option<String> {
    let own = |e: &Expr| match e {
        Expr::Alias(alias) if alias.name.starts_with('_') => passes(&alias.expr, &alias.name).is_none(),
        _ => false,
    };
    match plan {
        LogicalPlan::Projection(p) => p.expr.iter().find(|e| own(e)).map(|e| e.schema_name().to_string()),
        LogicalPlan::SubqueryAlias(_) | LogicalPlan::Sort(_) | LogicalPlan::Limit(_) | LogicalPlan::Distinct(_) => {
            plan.inputs().first().and_then(|input| reserved_column(input))
        }
        _ => None,
    }
}
