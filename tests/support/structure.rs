//! A graph as text: nodes, options, edges, permissions, roots.

use blockplex_graph::{BlockGraph, NodeView};
use std::fmt::Write;

/// Everything about the graph that a change could change, in a fixed order. Two equal texts mean
/// two equal graphs.
pub fn structure(graph: &BlockGraph) -> String {
    let topology = graph.topology();
    let mut text = String::new();
    for view in topology.nodes() {
        describe(&mut text, view);
    }
    for origin in topology.origins() {
        let root = topology.root(origin.id()).map(|view| view.name());
        writeln!(text, "{} on {root:?}: {:?}", origin.name(), origin.access())
            .expect("a string takes all");
    }
    text
}

fn describe(text: &mut String, view: &NodeView) {
    let (id, name, access) = (view.id(), view.name(), view.access());
    let (options, limits) = (view.options(), view.limits());
    writeln!(text, "{id:?} {name}: {access:?} {options:?} {limits:?}").expect("a string takes all");
    for edge in view.edges() {
        writeln!(text, "  {} ({:?}) -> {:?}: {:?}", edge.name, edge.role, edge.child, edge.access)
            .expect("a string takes all");
    }
}
