//! What a PromQL query reads.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::Duration;

use promql_parser::label::Matchers;
use promql_parser::parser::{self, Expr, Offset, VectorSelector};
use promql_parser::util::{ExprVisitor, walk_expr};

/// The parts of a query that must exist in what it reads.
#[derive(Debug, Default)]
pub struct Query {
    /// The names of its series.
    pub names: BTreeSet<String>,
    /// The labels that it selects by or keeps, each with the names of all series of the query.
    pub labels: BTreeSet<String>,
    /// The longest range or offset.
    pub longest: Duration,
}

impl Query {
    /// # Errors
    /// The query is not PromQL.
    pub fn parse(text: &str) -> Result<Self, String> {
        let expression = parser::parse(text).map_err(|error| format!("{text}: {error}"))?;
        let mut query = Self::default();
        let Ok(_) = walk_expr(&mut query, &expression);
        Ok(query)
    }

    fn select(&mut self, selector: &VectorSelector) {
        self.names.extend(selector.name.clone());
        let Matchers { matchers, or_matchers } = &selector.matchers;
        let matchers = matchers.iter().chain(or_matchers.iter().flatten());
        self.labels.extend(matchers.map(|matcher| matcher.name.clone()));
        if let Some(Offset::Pos(offset)) = selector.offset {
            self.longest = self.longest.max(offset);
        }
    }
}

impl ExprVisitor for Query {
    type Error = Infallible;

    fn pre_visit(&mut self, expression: &Expr) -> Result<bool, Infallible> {
        match expression {
            Expr::VectorSelector(selector) => self.select(selector),
            Expr::MatrixSelector(matrix) => {
                self.select(&matrix.vs);
                self.longest = self.longest.max(matrix.range);
            }
            Expr::Subquery(subquery) => self.longest = self.longest.max(subquery.range),
            Expr::Aggregate(aggregate) => {
                let modifier = aggregate.modifier.iter();
                self.labels.extend(modifier.flat_map(|modifier| modifier.labels().labels.clone()));
            }
            _ => {}
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_labels_and_ranges_of_a_query_are_found() {
        let text = r#"sum by (a, le) (rate(x_bucket{b="1"}[5m])) / on (a) y offset 1h > 2 and absent(z)"#;
        let query = Query::parse(text).unwrap();
        assert_eq!(Vec::from_iter(query.names), ["x_bucket", "y", "z"]);
        assert_eq!(Vec::from_iter(query.labels), ["a", "b", "le"]);
        assert_eq!(query.longest, Duration::from_secs(3600));
        assert!(Query::parse("sum by (a (x)").is_err());
    }
}
